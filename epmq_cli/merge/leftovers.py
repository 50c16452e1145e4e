"""Tensors that are not merged: which ones every model has beside those of the family, and which ones are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from epmq_cli.checkpoint.model_class import equal
from epmq_cli.checkpoint.reader import DTYPES
from epmq_cli.families.family import Family
from epmq_cli.merge.source import SHOWN
from epmq_cli.merge.tied_weights import Member
from epmq_cli.merge.vocabulary import is_over_vocabulary

COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
"""Buffers that old files hold and that transformers computes."""


def skip_ignored(base: Member, experts: Mapping[str, Member]) -> None:
    """Takes out what the base's class does not load on purpose, such as buffers of old versions."""
    if base.known is None:
        return
    for member in (base, *experts.values()):
        for name, stored in list(member.stored.items()):
            if base.known.ignores(stored):
                member.stored.pop(name)
                member.merged.pop(name, None)


def take_common(family: Family, base: Member, experts: Mapping[str, Member]) -> None:
    """Has everything merged that base and all experts have, such as a head of pretraining; but no heads of tasks."""
    members = [base, *experts.values()]
    common = set.intersection(*({*member.stored, *member.tied} for member in members))
    for name in common:
        if not family.in_head(name) and not COMPUTED.search(name) and _fits(name, members):
            for member in members:
                if name in member.stored:
                    member.merged.setdefault(name, member.stored[name])


def _fits(name: str, members: list[Member]) -> bool:
    """Whether a tensor is of a floating type and of one shape in all models, but for the rows of a vocabulary."""
    having = [member.folder for member in members if name in member.stored]
    infos = [member.folder.infos[member.stored[name]] for member in members if name in member.stored]
    return all(
        info.dtype in DTYPES
        and (info.shape == infos[0].shape or is_over_vocabulary(infos[0], having[0].config, info, folder.config))
        for info, folder in zip(infos, having, strict=True)
    )


def left_out(family: Family, base: Member, experts: Mapping[str, Member]) -> list[str]:
    """What experts have that is not in the result, a sentence for each; these tensors are no longer merged.

    Tensors under a module that the base's class has not are left out, as transformers does not load them either. Not
    counted are heads of tasks, buffers that are computed, and what equals the base's.
    """
    said = []
    for expert in experts.values():
        names = [name for name in expert.stored if name not in base.merged and _lost(family, name, base, expert)]
        for name in names:
            expert.merged.pop(name, None)
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            listed = ", ".join(expert.stored[name] for name in names[:SHOWN])
            said.append(
                f"{expert.folder.role}: {listed}{more} {'is' if len(names) == 1 else 'are'} left out, since the base "
                "or another expert has no such tensor or the result does not contain it"
            )
    return said


def _lost(family: Family, name: str, base: Member, expert: Member) -> bool:
    """Whether an expert's tensor that is not merged says something that the result does not have."""
    stored = expert.stored[name]
    if name in expert.merged:  # the family merges it, and the base does not have it
        return base.known is not None and stored.partition(".")[0] not in base.known.parts
    if family.in_head(name) or COMPUTED.search(name):
        return False
    source = expert.tieable.get(name)
    if source is not None and expert.is_source(name, source):
        return False
    own = base.stored.get(name)
    return own is None or not equal((base.folder, own), (expert.folder, stored))
