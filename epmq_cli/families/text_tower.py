"""The parts of a CLIP expert beside its vision tower that training may change: text tower, projections, logit scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from epmq_cli.data.suite import Task
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import DTYPES, ModelFolder
from epmq_cli.runtime.console import say

if TYPE_CHECKING:
    from torch import Tensor

TEXT = ("text_model", "text_projection")
PROJECTION = "visual_projection.weight"
PARTS = (*TEXT, "visual_projection", "logit_scale")
PIECE = 1 << 22  # elements per comparison: 32 MB in float64

log = logging.getLogger("epmq")


def drifts(base: ModelFolder, expert: ModelFolder) -> dict[str, float]:
    """||expert - base|| / ||base|| of each of PARTS that an expert has trained, by name; infinite if a tensor has
    another shape. Tensors are read one by one. Differences below the precision of the coarser type do not count."""
    drift = {}
    for part in PARTS:
        names = [name for name in base.infos if name.partition(".")[0] == part and name in expert.infos]
        names = [name for name in names if {base.infos[name].dtype, expert.infos[name].dtype} <= set(DTYPES)]
        moved, norm, changed = 0.0, 0.0, False
        for name in names:
            if base.infos[name].shape != expert.infos[name].shape:
                moved, changed = math.inf, True
                continue
            one, other = expert.tensor(name), base.tensor(name)
            changed = changed or _differ(one, other)
            for pair in zip(*(torch.split(tensor.flatten(), PIECE) for tensor in (one, other)), strict=True):
                mine, bases = (piece.double() for piece in pair)
                moved += float((mine - bases).square().sum())
                norm += float(bases.square().sum())
        if changed:
            drift[part] = math.sqrt(moved / norm) if norm else math.inf
    return drift


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ when both are rounded to the coarser of their types."""
    coarse = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return not torch.equal(one.to(coarse), other.to(coarse))


def tell(expert: ModelFolder, task: Task, drift: Mapping[str, float], merged: bool) -> None:
    """Reports the parts that an expert has trained beside its vision tower, how far they moved, and how epmq uses
    them. `merged`: whether visual projections are merged."""
    if not drift:
        return
    sizes = ", ".join(f"{part} {size:.1%}" if math.isfinite(size) else part for part, size in drift.items())
    line = (
        f"{expert.role}: it differs from the base outside its vision tower, by the relative norm of the change: {sizes}"
    )
    head = "its own text tower makes its head"
    unused = [part for part in drift if part in TEXT and task.heads != "expert"]
    if unused:
        head = "the base's text tower makes its head; set suite.heads=expert to use its own"
    projection = "; its visual projection is merged" if merged and "visual_projection" in drift else ""
    line = f"{line}; {head}{projection}" if any(part in TEXT for part in drift) else f"{line}{projection}"
    if unused:
        log.warning("%s", line)
    else:
        say(line)


def own_text_tower(expert: ModelFolder, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an expert's own text tower and its projection, under the names of the model; empty if the expert
    has none and uses the base's. `own`: the model's tensors. ModelError if a shape differs."""
    names = [name for name in own if name.partition(".")[0] in TEXT and name in expert.infos]
    tensors = {}
    for name in names:
        shape = expert.infos[name].shape
        if shape != tuple(own[name].shape):
            raise ModelError(
                f"{expert.role}: {name} is {list(shape)} in the expert and {list(own[name].shape)} in the base, so its "
                "text tower cannot make its head; set suite.heads=base"
            )
        if own[name].is_floating_point():
            tensors[name] = expert.tensor(name).float().to(own[name].device)
    return tensors
