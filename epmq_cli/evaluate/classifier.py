"""Classification by a task's own linear head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.errors import ModelError


def read_head(expert: ModelFolder, name: str) -> dict[str, Tensor]:
    """`weight` (classes, width) and, where the linear has one, `bias` (classes,), in float32."""
    head = {
        part: expert.tensor(f"{name}.{part}").float() for part in ("weight", "bias") if f"{name}.{part}" in expert.infos
    }
    if "weight" not in head:
        raise ModelError(f"{expert.role}: {expert.path} has no {name}.weight, the head of its task")
    return head


def logits(features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """(samples, classes) from features (samples, width)."""
    product = features @ head["weight"].T
    return product + head["bias"] if "bias" in head else product
