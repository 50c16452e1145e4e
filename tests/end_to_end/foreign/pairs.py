"""Suites of two experts that are saved in different ways, and their mean in plain torch."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.end_to_end.foreign.adapters import ADAPTERS
from tests.end_to_end.foreign.combinations import Combination
from tests.end_to_end.foreign.forms import plain
from tests.end_to_end.foreign.kinds import KINDS, Kind, body_of, model, outputs
from tests.end_to_end.foreign.savings import SAVINGS
from tests.end_to_end.foreign.wrappers import WRAPPERS

EACH = 7  # pairs per kind


@dataclass(frozen=True)
class Pair:
    """Expert "a" with the base, and expert "b" of the same base, in forms that a user could have."""

    first: Combination
    second: Combination

    def __str__(self) -> str:
        rest = str(self.second).removeprefix(f"{self.second.kind}+")
        return f"{self.first}+and+{rest}"

    @property
    def may_be_refused(self) -> str | None:
        """Why a refusal is correct too; None if the pair must be merged."""
        return self.first.may_be_refused or self.second.may_be_refused


def every_pair() -> list[Pair]:
    """Draws of pairs, in a fixed order."""
    draw = random.Random(81)
    return [_drawn(kind, draw) for kind in KINDS.values() for _ in range(EACH)]


def _drawn(kind: Kind, draw: random.Random) -> Pair:
    """Two sides, each with a way of saving; the second usually has a wrapper or an adapter too."""
    ways = [name for name, saving in SAVINGS.items() if saving.applies(kind) and not saving.may_be_refused]
    adapters = [name for name, adapter in ADAPTERS.items() if adapter.applies(kind)]
    first = Combination(kind.name, draw.choice(ways))
    second = Combination(kind.name, draw.choice([name for name in ways if _may_be_second(name)]))
    chance = draw.random()
    if chance < 0.4:
        second = Combination(kind.name, adapter=draw.choice(adapters))
    elif chance < 0.8:
        second = replace(second, wrapper=draw.choice([name for name in WRAPPERS if name != "none"]))
    return Pair(first, second)


def _may_be_second(name: str) -> bool:
    """Whether a way of saving affects an expert."""
    saving = SAVINGS[name]
    return saving.expert is not plain or saving.layout is not SAVINGS["plain"].layout or saving.role is not None


def quick_pairs(pairs: list[Pair]) -> set[Pair]:
    """One pair for every fourth kind."""
    return set(pairs[1 :: 4 * EACH])


def mean(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the experts' parameters, by name."""
    return {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}


@torch.no_grad()
def mean_outputs(kind: Kind, parameters: Mapping[str, Tensor]) -> Tensor:
    """The outputs of a model with these parameters."""
    whole: Any = copy.deepcopy(model(kind.name, "base"))
    if (kind.is_decoder or kind.family == "t5") and kind.tied:
        whole.lm_head.weight = nn.Parameter(whole.lm_head.weight.detach().clone())
    body = body_of(kind, whole)
    own = dict(body.named_parameters(remove_duplicate=False))
    for name, tensor in parameters.items():
        own[name].copy_(tensor)
    return outputs(kind, body)
