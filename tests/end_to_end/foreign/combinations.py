"""The combinations of user folders: one for each value of each axis and kind, and draws that mix the axes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.end_to_end.foreign.adapters import ADAPTERS
from tests.end_to_end.foreign.kinds import KINDS, Kind
from tests.end_to_end.foreign.savings import SAVINGS
from tests.end_to_end.foreign.wrappers import WRAPPERS
from tests.helpers.tiers import covering

MIXED = 60  # number of draws that mix a saving with a wrapper or an adapter


@dataclass(frozen=True)
class Combination:
    """One base with one expert, in a form that a user could have."""

    kind: str
    saving: str = "plain"
    wrapper: str = "none"
    adapter: str = "none"

    def __str__(self) -> str:
        rest = (value for value in (self.wrapper, self.adapter) if value != "none")
        return "+".join((self.kind, self.saving, *rest))

    @property
    def may_be_refused(self) -> str | None:
        """Why a refusal is correct too; None if the combination must be merged."""
        kind, saving = KINDS[self.kind], SAVINGS[self.saving]
        if self.adapter != "none":
            adapter = ADAPTERS[self.adapter]
            base = saving.may_be_refused if saving.base_layout is not saving.layout else None
            return adapter.may_be_refused or base or _lacking(kind, self)
        return saving.may_be_refused or WRAPPERS[self.wrapper].may_be_refused or _lacking(kind, self)


def _lacking(kind: Kind, combination: Combination) -> str | None:
    """Refusals that concern some kinds only."""
    if kind.family == "t5" and combination.saving in ("buffers-base", "buffers-expert"):
        return "a table of positions that one of the two does not have"
    if combination.adapter == "all-linear" and kind.name in ("vit", "deberta", "modernbert"):
        return "it adapts linears of the head, which the base, an encoder alone, does not have"
    return None


def every() -> list[Combination]:
    """All combinations, in a fixed order."""
    found = [*_savings(), *_wrappers(), *_adapters()]
    return list(dict.fromkeys([*found, *_mixed()]))


def _savings() -> list[Combination]:
    return [
        Combination(kind.name, name)
        for kind in KINDS.values()
        for name, saving in SAVINGS.items()
        if saving.applies(kind)
    ]


def _wrappers() -> list[Combination]:
    names = [name for name in WRAPPERS if name != "none"]
    return [Combination(kind, "pt", name) for kind in KINDS for name in names] + [
        Combination(kind, "plain", name) for number, kind in enumerate(KINDS) for name in names[number % 2 :: 2]
    ]


def _adapters() -> list[Combination]:
    return [
        Combination(kind.name, "plain", "none", name)
        for kind in KINDS.values()
        for name, adapter in ADAPTERS.items()
        if kind.trained and adapter.applies(kind)
    ]


def _mixed() -> list[Combination]:
    """Draws of a saving and a wrapper, or of a saving of the base and an adapter."""
    draw, found = random.Random(18), []
    ways = [made for made in _savings() if made.saving not in ("plain", "bin", "bin-shards")]
    while len(found) < MIXED:
        made = draw.choice(ways)
        kind, saving = KINDS[made.kind], SAVINGS[made.saving]
        adapters = [name for name, adapter in ADAPTERS.items() if adapter.applies(kind)]
        on_base = saving.base_layout is not SAVINGS["plain"].base_layout or saving.base is not SAVINGS["plain"].base
        if on_base and draw.random() < 0.5:
            found.append(replace(made, adapter=draw.choice(adapters)))
        else:
            found.append(replace(made, wrapper=draw.choice([name for name in WRAPPERS if name != "none"])))
    return found


def quick(combinations: list[Combination]) -> set[Combination]:
    """The default tier: combinations that have each value of each axis at least once."""
    return covering(combinations, ("saving", "wrapper", "adapter"))
