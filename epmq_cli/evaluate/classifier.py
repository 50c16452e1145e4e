"""Classification by a task's own linear head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.errors import ModelError
from epmq_cli.linalg import is_finite


def read_head(expert: ModelFolder, name: str, width: int) -> dict[str, Tensor]:
    """`weight` (classes, width) and, where the linear has one, `bias` (classes,), in float32; ModelError where they are
    not there, of other shapes or not finite."""
    head = {
        part: expert.tensor(f"{name}.{part}").float() for part in ("weight", "bias") if f"{name}.{part}" in expert.infos
    }
    if "weight" not in head:
        raise ModelError(f"{expert.role}: {expert.path} has no {name}.weight, the head of its task")
    shapes = {"weight": (len(head["weight"]), width), "bias": (len(head["weight"]),)}
    for part, tensor in head.items():
        if tensor.shape != shapes[part]:
            raise ModelError(
                f"{expert.role}: {name}.{part} must have the shape {list(shapes[part])} to read what the base gives, "
                f"got {list(tensor.shape)}"
            )
        if not is_finite(tensor):
            raise ModelError(f"{expert.role}: {name}.{part} holds a NaN or an infinity; train or fetch the model again")
    return head


def logits(features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """(samples, classes) from features (samples, width)."""
    product = features @ head["weight"].T
    return product + head["bias"] if "bias" in head else product
