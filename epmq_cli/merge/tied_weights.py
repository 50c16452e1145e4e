"""Which tensors of a suite's models are tied, and what that makes of the merge.

What can be tied is asked of the model's class in transformers. What is tied is decided by config and tensors, as
transformers does when it loads: a stored copy that equals its source is the source, one that differs is a tensor of its
own, and where only a copy is stored it is the source. A copy stays tied if it is in the base and in every expert.
Otherwise the result is untied: models in which it is tied give their source's values for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.merge.vocabulary import vocabulary_of
from epmq_cli.models.model_class import TIE, ModelClass, equal, model_class, untied_config
from epmq_cli.models.model_folder import ModelFolder


@dataclass
class Member:
    """One model of a suite: `stored`, all of its tensors; `merged`, those that are merged (name -> stored name)."""

    folder: ModelFolder
    stored: dict[str, str]
    merged: dict[str, str]
    known: ModelClass | None = None
    tied: dict[str, str] = field(default_factory=dict)
    """copy -> source, as the config says."""
    tieable: dict[str, str] = field(default_factory=dict)
    """Likewise, if it said that embeddings are tied."""
    spelled: dict[str, str] = field(default_factory=dict)
    """What the class calls these tensors."""
    sources: dict[str, str] = field(default_factory=dict)
    """source -> the stored name that has its values, where the source is not stored itself."""

    def value(self, name: str) -> str | None:
        """The stored name of a source's values."""
        return self.sources.get(name) or self.stored.get(name)

    def is_source(self, copy: str, source: str) -> bool:
        """Whether a copy has the values of its source: it is not stored, or stored with equal values."""
        stored, origin = self.stored.get(copy), self.value(source)
        if stored is None or stored == origin:
            return True
        return origin is not None and equal((self.folder, stored), (self.folder, origin))


@dataclass(frozen=True)
class Ties:
    """How the ties of the models come out.

    `written`: the names in the result's files of merged tensors that the base stores under another name or not at all.
    `dropped`: the stored names of the base's tensors that are not written, such as copies. `untied`: the copies that
    are tied in the base and tensors of their own in the result. `changes`: what changes in config.json. `said`: a
    sentence, if untied.
    """

    written: dict[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    untied: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    said: str | None = None


def are_plain(base: Member, experts: Mapping[str, Member]) -> bool:
    """Whether nothing can be tied or copied differently in these models, as far as names, shapes and configs say: then
    transformers, which takes seconds to import, need not be asked."""
    settings = {str(_setting(member.folder.config)) for member in (base, *experts.values())}
    names = [set(member.stored) for member in (base, *experts.values())]
    twice = any(_tables(member.folder) > 1 for member in (base, *experts.values()))
    return len(settings) == 1 and all(found == names[0] for found in names) and not twice


def _setting(config: Mapping[str, Any]) -> list[Any]:
    nested = [value for value in config.values() if isinstance(value, dict)]
    return [config.get(TIE), *(value.get(TIE) for value in nested)]


def _tables(folder: ModelFolder) -> int:
    """How many matrices over the vocabulary, or over the rows of the largest one, there are."""
    shapes = [info.shape for info in folder.infos.values() if len(info.shape) == 2]
    rows = vocabulary_of(folder.config) or max((shape[0] for shape in shapes), default=0)
    return sum(shape[0] == rows for shape in shapes)


def ask_classes(family: Family, members: list[Member]) -> None:
    """Fills in what transformers says of each model's class, and what is tied by its config."""
    for member in members:
        member.known = model_class(member.folder.config, member.folder.infos)
        if member.known is not None:
            member.tied, member.tieable = (
                {family.spelling(copy): family.spelling(source) for copy, source in pairs.items()}
                for pairs in (member.known.tied, member.known.tieable)
            )
            names = [*member.known.tieable, *member.known.tieable.values()]
            member.spelled = {family.spelling(name): name for name in names}
            for copy, source in member.tied.items():
                if source not in member.stored and copy in member.stored:
                    member.sources.setdefault(source, member.stored[copy])


def resolve_ties(family: Family, base: Member, experts: Mapping[str, Member]) -> Ties:
    """How the ties come out; the members' merged tensors become those of the result. ModelError where they cannot be as
    the models have them."""
    members = [base, *experts.values()]
    spelled = {name: own for member in reversed(members) for name, own in member.spelled.items()}
    pairs = {copy: source for member in members for copy, source in member.tieable.items()}
    for member in members if family.heads == "none" else ():  # the others have none of these tensors in their models
        for copy, source in member.tieable.items():
            _check_there(member, copy, source)
    wanted = {copy for copy in pairs if any(copy in member.merged for member in members)}
    own = {copy: _differing(base, experts, copy, source) for copy, source in pairs.items() if copy in wanted}
    untied = [copy for copy, owner in own.items() if owner is not None]
    changes = _changes(base, [copy for copy in untied if copy in base.tied], spelled, own, pairs)
    if changes:
        loose = _tied_by(family, {**base.folder.config, **changes}, base)
        others = [copy for copy in base.tied if copy not in loose and copy not in untied]
        untied += [copy for copy in others if any(pairs[copy] in member.merged for member in members)]
    for copy, source in pairs.items():
        _place(members, copy, source, copy in untied)
    written = {source: spelled[source] for source in base.sources if source in base.merged}
    written |= {copy: base.stored.get(copy, spelled[copy]) for copy in untied if copy in base.merged}
    kept = [copy for copy in pairs if copy not in untied and copy in base.tied and copy in base.stored]
    lost = frozenset(base.stored[copy] for copy in kept if base.is_source(copy, pairs[copy]))
    new = tuple(copy for copy in untied if copy in base.tied)
    return Ties(written, lost, new, changes, _said(new, own, pairs, changes))


def _tied_by(family: Family, config: Mapping[str, Any], base: Member) -> set[str]:
    known = model_class(config, base.folder.infos)
    return {family.spelling(copy) for copy in known.tied} if known is not None else set()


def _differing(base: Member, experts: Mapping[str, Member], copy: str, source: str) -> ModelFolder | None:
    """The first model that has a tensor of its own in place of a copy; None where it is tied in all, or in none of the
    models that have it stored."""
    if copy not in base.tied:
        return base.folder if copy in base.stored else None
    for member in (base, *experts.values()):
        if not member.is_source(copy, source):
            return member.folder
    return None


def _check_there(member: Member, copy: str, source: str) -> None:
    """ModelError where a model has neither a copy nor what it is tied to, though its class has such a tensor."""
    loose = copy in member.tieable and copy not in member.tied
    if loose and copy not in member.stored and source in member.stored:
        raise ModelError(
            f"{member.folder.role}: {member.folder.path} has no {copy}, which its config does not tie to {source}; "
            f"save the model again with {copy}, or set {TIE} to true in config.json if the two are tied"
        )


def _changes(
    base: Member,
    own: list[str],
    spelled: Mapping[str, str],
    owners: Mapping[str, ModelFolder | None],
    pairs: Mapping[str, str],
) -> dict[str, Any]:
    """What says in config.json that these copies, which it ties, are not tied. ModelError where the class ties them in
    any case; but for an output layer: transformers loads what is stored there."""
    if not own or base.known is None:
        return {}
    found = untied_config(base.folder.config, base.folder.infos, [spelled[copy] for copy in own])
    if found is not None:
        return {} if all(base.folder.config.get(key) == value for key, value in found.items()) else found
    for copy in own:
        if spelled[copy] not in base.known.outputs:
            owner, source = owners[copy] or base.folder, pairs[copy]
            raise ModelError(
                f"{owner.role}: {owner.path} stores {copy} with other values than {source}, to which "
                f"{base.known.name} always ties it; delete {copy} from its files if {source} is the trained tensor, or "
                "store the trained one under both names"
            )
    return {}


def _place(members: list[Member], copy: str, source: str, own: bool) -> None:
    """Puts a copy among the merged tensors of each model where it is a tensor of its own, else takes it out; and the
    stored name that has the source's values."""
    scope = own or any(copy in member.merged for member in members)
    for member in members:
        stored, origin = member.stored.get(copy), member.value(source)
        if source in member.sources and scope:
            member.merged[source] = member.sources[source]
        member.merged.pop(copy, None)
        if own:
            value = origin if copy in member.tied and (stored is None or stored == origin) else stored
            if value is not None:
                member.merged[copy] = value


def _said(
    new: tuple[str, ...], own: Mapping[str, ModelFolder | None], pairs: Mapping[str, str], changes: Mapping[str, Any]
) -> str | None:
    named = [copy for copy in new if own.get(copy) is not None]
    if not named:
        return None
    copy, owner = named[0], own[named[0]]
    assert owner is not None
    how = f"{TIE} is false in config.json" if changes else "transformers 5 loads it so, earlier versions tie it"
    return f"{copy} is not tied to {pairs[copy]} in the {owner.role}: it is merged as a tensor of its own ({how})"
