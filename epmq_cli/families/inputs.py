"""Checks that the inputs of a task are of a kind that its family reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from epmq_cli.data.chats import Chat
from epmq_cli.data.sounds import Sound
from epmq_cli.errors import DataError
from epmq_cli.families.family import Family

KINDS = {Chat: "conversations", str: "texts", tuple: "pairs of texts", Image.Image: "images", Sound: "sounds"}


def _reads(family: Family, first: Any) -> bool:
    return Chat in family.sample_types if isinstance(first, Chat) else isinstance(first, family.sample_types)


def check_inputs(family: Family, task: str, inputs: Sequence[Any]) -> None:
    """Raises DataError if the family does not read inputs such as the first one."""
    if not len(inputs) or _reads(family, first := inputs[0]):
        return
    kind = next((name for each, name in KINDS.items() if isinstance(first, each)), type(first).__name__)
    where = f"{first.where} holds" if isinstance(first, Chat) else "its data are"
    expected = " or ".join(KINDS.get(each, each.__name__) for each in family.sample_types)
    raise DataError(
        f"task {task}: {where} {kind}, and family {family.name} reads {expected}; choose other columns or another data "
        "source"
    )
