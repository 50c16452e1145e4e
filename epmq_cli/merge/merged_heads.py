"""Task heads in a merge of whole models: merged if base and all experts have heads for the same classes.

The base's own head is never written beside a merged encoder, which it was not trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import names_by_position
from epmq_cli.merge.tied_weights import Member
from epmq_cli.models.model_class import model_class
from epmq_cli.runtime.console import log, plain, say


@dataclass(frozen=True)
class MergedHeads:
    """`dropped`: stored names of the base's head that are not written. `changes`: keys to change in config.json."""

    dropped: frozenset[str] = frozenset()
    changes: dict[str, Any] = field(default_factory=dict)


def settle_heads(family: Family, base: Member, experts: Mapping[str, Member]) -> MergedHeads:
    """Merges the heads if they are for the same classes, and reports the decision."""
    if family.heads != "own":
        return MergedHeads()
    head = _head(family, base)
    having = [task for task, expert in experts.items() if _head(family, expert)]
    if not head:
        if having:
            say(
                f"the task heads of {', '.join(having)} are not merged, because the base has none; they are merged "
                "with a base that has a head for the same classes"
            )
        return MergedHeads()
    reason = next((why for expert in experts.values() if (why := _difference(family, base, expert))), None)
    names = [names_by_position(_labels(expert)) for expert in experts.values()]
    if reason is None and any(other != names[0] for other in names):
        reason = "the experts' heads are for different classes"
    if reason is not None:
        changes = _body(base, head)
        result = f"; the result is a {changes['architectures'][0]}" if changes else ""
        listed = ", ".join(base.stored[name] for name in head)
        log.warning(plain(f"base: its task head ({listed}) is left out, because {reason}{result}"))
        return MergedHeads(frozenset(base.stored[name] for name in head), changes)
    for member in (base, *experts.values()):
        member.merged |= {name: member.stored[name] for name in head}
    say("the task heads are merged too, because the base and all experts have heads for the same classes")
    if names[0] == names_by_position(_labels(base)):
        return MergedHeads()
    labels = {str(position): name for position, name in sorted(names[0].items())}
    return MergedHeads(changes={"id2label": labels, "label2id": {name: int(key) for key, name in labels.items()}})


def _head(family: Family, member: Member) -> list[str]:
    """The tensors of a task's head; empty if the linear is missing, as in a base that was trained on masked words."""
    if f"{family.head_linear}.weight" not in member.stored:
        return []
    return [name for name in member.stored if family.in_head(name)]


def _difference(family: Family, base: Member, expert: Member) -> str | None:
    """Why an expert's head cannot be merged with the base's; None if it can."""
    head, role = _head(family, base), expert.folder.role
    if set(head) != set(_head(family, expert)):
        return f"the {role} has {'another' if _head(family, expert) else 'no'} head"
    for name in head:
        own, other = expert.folder.infos[expert.stored[name]], base.folder.infos[base.stored[name]]
        if own.shape != other.shape:
            return f"{name} is {list(own.shape)} in the {role} and {list(other.shape)} in the base"
    names, base_names = names_by_position(_labels(expert)), names_by_position(_labels(base))
    if base_names and names != base_names:
        return f"the head of the {role} is for other classes (id2label)"
    return None


def _labels(member: Member) -> Mapping[Any, Any]:
    labels = member.folder.config.get("id2label")
    return labels if isinstance(labels, dict) else {}


def _body(base: Member, head: list[str]) -> dict[str, Any]:
    """The keys of config.json that make the result the encoder alone; empty if the base's class has no head."""
    cls = base.own_class or model_class(base.folder.config, base.folder.infos)
    if cls is None or not any(base.stored[name].partition(".")[0] in cls.parts for name in head):
        return {}
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    body = MODEL_MAPPING_NAMES.get(base.folder.config.get("model_type"))
    return {"architectures": [body]} if isinstance(body, str) else {}
