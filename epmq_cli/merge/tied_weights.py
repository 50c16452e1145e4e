"""Decides which tied tensors of a suite's models stay tied in the merge.

The transformers class of a model defines which tensors can be tied. Config and tensors decide which are, as when
transformers loads a model: a stored copy that equals its source is tied, one that differs is a separate tensor, and a
copy that is stored without its source has the source's values. A copy stays tied if it is tied in the base and in every
expert. Otherwise it becomes a separate tensor, and models that tie it contribute their source's values.
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
    """One model of a suite: all its tensors (`stored`) and those to merge (`merged`), both name -> stored name."""

    folder: ModelFolder
    stored: dict[str, str]
    merged: dict[str, str]
    own_class: ModelClass | None = None
    tied: dict[str, str] = field(default_factory=dict)
    """copy -> source, by the config."""
    tieable: dict[str, str] = field(default_factory=dict)
    """copy -> source, if the config tied the embeddings."""
    spelled: dict[str, str] = field(default_factory=dict)
    """name -> the class's name, for these tensors."""
    sources: dict[str, str] = field(default_factory=dict)
    """source -> the stored name of its values, if the source itself is not stored."""

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
    """The result's ties.

    `written`: names in the result's files of merged tensors that the base stores under another name or not at all.
    `dropped`: stored names of the base's tensors that are not written, such as copies. `untied`: copies that are tied
    in the base and separate in the result. `changes`: keys to change in config.json. `message`: a sentence for the user
    if a copy was untied.
    """

    written: dict[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    untied: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    message: str | None = None


def are_plain(base: Member, experts: Mapping[str, Member]) -> bool:
    """Whether names, shapes and configs show that no model ties its tensors differently. Then the slow import of
    transformers is not needed."""
    settings = {str(_setting(member.folder.config)) for member in (base, *experts.values())}
    names = [set(member.stored) for member in (base, *experts.values())]
    twice = any(_tables(member.folder) > 1 for member in (base, *experts.values()))
    return len(settings) == 1 and all(other == names[0] for other in names) and not twice


def _setting(config: Mapping[str, Any]) -> list[Any]:
    nested = [value for value in config.values() if isinstance(value, dict)]
    return [config.get(TIE), *(value.get(TIE) for value in nested)]


def _tables(folder: ModelFolder) -> int:
    """The number of matrices with a row for each token, or with as many rows as the longest matrix."""
    shapes = [info.shape for info in folder.infos.values() if len(info.shape) == 2]
    rows = vocabulary_of(folder.config) or max((shape[0] for shape in shapes), default=0)
    return sum(shape[0] == rows for shape in shapes)


def ask_classes(family: Family, members: list[Member]) -> None:
    """Sets the class of each model and the tensors that its config ties."""
    for member in members:
        member.own_class = model_class(member.folder.config, member.folder.infos)
        if member.own_class is not None:
            member.tied, member.tieable = (
                {family.spelling(copy): family.spelling(source) for copy, source in pairs.items()}
                for pairs in (member.own_class.tied, member.own_class.tieable)
            )
            names = [*member.own_class.tieable, *member.own_class.tieable.values()]
            member.spelled = {family.spelling(name): name for name in names}
            for copy, source in member.tied.items():
                if source not in member.stored and copy in member.stored:
                    member.sources.setdefault(source, member.stored[copy])


def resolve_ties(family: Family, base: Member, experts: Mapping[str, Member]) -> Ties:
    """The ties of the result; sets the merged tensors of all members to its own. ModelError if a model's tensors do
    not fit its class."""
    members = [base, *experts.values()]
    spelled = {name: own for member in reversed(members) for name, own in member.spelled.items()}
    pairs = {copy: source for member in members for copy, source in member.tieable.items()}
    for member in members if family.vocabulary else ():  # models of other families have no output layer
        for copy, source in member.tieable.items():
            _check_there(member, copy, source)
    copies = {copy for copy in pairs if any(copy in member.merged for member in members)}
    own = {copy: _differing(base, experts, copy, source) for copy, source in pairs.items() if copy in copies}
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
    tied = [copy for copy in pairs if copy not in untied and copy in base.tied and copy in base.stored]
    dropped = frozenset(base.stored[copy] for copy in tied if base.is_source(copy, pairs[copy]))
    new = tuple(copy for copy in untied if copy in base.tied)
    return Ties(written, dropped, new, changes, _message(new, own, pairs, changes))


def _tied_by(family: Family, config: Mapping[str, Any], base: Member) -> set[str]:
    cls = model_class(config, base.folder.infos)
    return {family.spelling(copy) for copy in cls.tied} if cls is not None else set()


def _differing(base: Member, experts: Mapping[str, Member], copy: str, source: str) -> ModelFolder | None:
    """The first model in which a copy is a separate tensor; None if every model ties it, or if the base lacks it."""
    if copy not in base.tied:
        return base.folder if copy in base.stored else None
    for member in (base, *experts.values()):
        if not member.is_source(copy, source):
            return member.folder
    return None


def _check_there(member: Member, copy: str, source: str) -> None:
    """Raises ModelError if a model lacks a tensor that its class can tie but its config does not."""
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
    """The keys of config.json that untie these copies. ModelError if the class always ties them. Output layers need
    no key: transformers loads them from the files."""
    if not own or base.own_class is None:
        return {}
    changes = untied_config(base.folder.config, base.folder.infos, [spelled[copy] for copy in own])
    if changes is not None:
        return {} if all(base.folder.config.get(key) == value for key, value in changes.items()) else changes
    for copy in own:
        if spelled[copy] not in base.own_class.outputs:
            owner, source = owners[copy] or base.folder, pairs[copy]
            raise ModelError(
                f"{owner.role}: {owner.path} stores {copy} with other values than {source}, to which "
                f"{base.own_class.name} always ties it; delete {copy} from its files if {source} is the trained "
                "tensor, or store the trained one under both names"
            )
    return {}


def _place(members: list[Member], copy: str, source: str, own: bool) -> None:
    """Merges a copy in each model if it is a separate tensor (`own`), else drops it. Also sets the stored name of the
    source's values."""
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


def _message(
    new: tuple[str, ...], own: Mapping[str, ModelFolder | None], pairs: Mapping[str, str], changes: Mapping[str, Any]
) -> str | None:
    named = [copy for copy in new if own.get(copy) is not None]
    if not named:
        return None
    copy, owner = named[0], own[named[0]]
    assert owner is not None
    how = f"{TIE} is false in config.json" if changes else "transformers 5 loads it so, earlier versions tie it"
    return f"{copy} is not tied to {pairs[copy]} in the {owner.role}: it is merged as a separate tensor ({how})"
