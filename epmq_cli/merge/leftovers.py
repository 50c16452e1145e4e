"""Decides which tensors beside those that the family names are merged, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.merge.source import SHOWN
from epmq_cli.merge.tied_weights import Member
from epmq_cli.merge.vocabulary import is_over_vocabulary
from epmq_cli.models.model_class import equal
from epmq_cli.models.model_folder import DTYPES

COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
"""Buffers that old files store and that transformers computes."""


def skip_ignored(base: Member, experts: Mapping[str, Member]) -> None:
    """Drops tensors that the base's class ignores on purpose, such as buffers of old versions."""
    if base.own_class is None:
        return
    for member in (base, *experts.values()):
        for name, stored in list(member.stored.items()):
            if base.own_class.ignores(stored):
                member.stored.pop(name)
                member.merged.pop(name, None)


def skip_added(family: Family, base: Member, experts: Mapping[str, Member]) -> None:
    """Drops from all models the tensors that fine-tuning adds (`Family.added`) and that at least one model lacks."""
    members = [base, *experts.values()]
    for name in {name for member in members for name in member.merged if name.startswith(family.added)}:
        if any(name not in member.merged for member in members):
            for member in members:
                member.merged.pop(name, None)


def check_added(family: Family, base: Member, experts: Mapping[str, Member]) -> None:
    """Raises ModelError if a model lacks tensors that fine-tuning adds (`Family.added`) and that `epmq run` needs."""
    for member in (base, *experts.values()):
        for part in family.added:
            if not any(name.startswith(part) for name in member.merged):
                raise ModelError(
                    f"{member.folder.role}: {member.folder.path} has no {part.rstrip('.')}, which the heads of its "
                    "family read; give a model that was saved with it, or use epmq merge, which does not need it"
                )


def skip_foreign(base: Member, experts: Mapping[str, Member], whole: bool) -> frozenset[str]:
    """Drops tensors that the base's class has no module for, such as the value head that TRL stores; a `whole` merge
    keeps those that every expert has. Returns the stored names of the dropped tensors."""
    dropped = set()
    for name in foreign(base):
        if not whole or any(name not in expert.merged for expert in experts.values()):
            base.merged.pop(name, None)
            dropped.add(base.stored[name])
    return frozenset(dropped)


def foreign(base: Member) -> set[str]:
    """The merged tensors of the base that its class has no module for; transformers does not load them."""
    return base.own_class.foreign(base.stored) & base.merged.keys() if base.own_class is not None else set()


def take_common(family: Family, base: Member, experts: Mapping[str, Member]) -> None:
    """Merges all tensors that base and experts share, such as a pretraining head, except task heads."""
    members = [base, *experts.values()]
    common = set.intersection(*({*member.stored, *member.tied} for member in members))
    for name in common:
        if not family.in_head(name) and not COMPUTED.search(name) and _fits(name, members):
            for member in members:
                if name in member.stored:
                    member.merged.setdefault(name, member.stored[name])


def _fits(name: str, members: list[Member]) -> bool:
    """Whether a tensor has a floating-point type and the same shape in all models, except for vocabulary rows."""
    having = [member.folder for member in members if name in member.stored]
    infos = [member.folder.infos[member.stored[name]] for member in members if name in member.stored]
    return all(
        info.dtype in DTYPES
        and (info.shape == infos[0].shape or is_over_vocabulary(infos[0], having[0].config, info, folder.config))
        for info, folder in zip(infos, having, strict=True)
    )


def left_out(family: Family, base: Member, experts: Mapping[str, Member]) -> list[str]:
    """Unmerges the experts' tensors that the result lacks. Returns one sentence for each expert that has some.

    Tensors of modules that the base's class lacks are left out, as transformers does not load them either. Task heads,
    computed buffers and tensors that equal the base's are not mentioned.
    """
    sentences = []
    for expert in experts.values():
        names = [name for name in expert.stored if name not in base.merged and _lost(family, name, base, expert)]
        for name in names:
            expert.merged.pop(name, None)
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            listed = ", ".join(expert.stored[name] for name in names[:SHOWN])
            sentences.append(
                f"{expert.folder.role}: {listed}{more} {'is' if len(names) == 1 else 'are'} left out, because the base "
                "or another expert does not have them, or the result does not contain them"
            )
    return sentences


def _lost(family: Family, name: str, base: Member, expert: Member) -> bool:
    """Whether an expert's tensor that is not merged holds information that the result lacks."""
    stored = expert.stored[name]
    if name in expert.merged:  # the family merges it, and the base does not have it
        return base.own_class is not None and stored.partition(".")[0] not in base.own_class.parts
    if family.in_head(name) or COMPUTED.search(name):
        return False
    source = expert.tieable.get(name)
    if source is not None and expert.is_source(name, source):
        return False
    own = base.stored.get(name)
    return own is None or not equal((base.folder, own), (expert.folder, stored))
