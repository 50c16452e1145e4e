"""Solves the modules of the first hidden state: embedding tables, and patch convolutions with a table of positions.

Their inputs are the samples, which student and teacher share. The objective is that of objective.py with alpha = 0:
RegMean (https://arxiv.org/abs/2212.09849) with an anchor. A table is a linear with one-hot inputs, whose H is diagonal:
each row is the mean of the experts' rows, weighted by the number of look-ups in each task. The anchor is the merged
value for any rho, so rows that no calibration sample looks up stay as merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import unfold

from epmq_cli.calibrate.activations.hidden_state import calls
from epmq_cli.calibrate.moments import Measure, task_weight
from epmq_cli.calibrate.objective import Objective
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.row_pieces import row_pieces
from epmq_cli.calibrate.student import Student
from epmq_cli.data.batching import Batch
from epmq_cli.families.structure import Mask, Patches, Stack, Table
from epmq_cli.runtime import distributed


def solve_stem(
    student: Student, stack: Stack, batches: Mapping[str, Sequence[Batch]], parts: Mapping[str, Sequence[Batch]]
) -> None:
    """Solves every module of the first hidden state of a stack. `parts`: the same samples as they run through the
    model; numbers of look-ups do not depend on the split."""
    for part in stack.stem:
        if isinstance(part, Patches):
            solve_patches(student, batches, part)
        else:
            solve_table(student, parts, part, stack.mask)


def solved_table(anchor: Tensor, experts: Iterable[Tensor], counts: Sequence[Tensor], lam: float) -> Tensor:
    """The rows (rows, width) closest to the experts' in the mean over look-ups; without look-ups the anchor's.

    `counts` (rows,): look-ups of each task, scaled by its weight.
    """
    total = sum(counts, torch.zeros_like(counts[0])) + lam
    moved = torch.zeros_like(anchor, dtype=torch.float64)
    for expert, count in zip(experts, counts, strict=True):
        for rows in row_pieces(slice(0, len(anchor)), anchor.shape[1]):
            moved[rows] += count[rows, None] * (expert[rows].double() - anchor[rows].double())
    share = torch.where(total > 0, 1 / total.clamp(min=1e-300), 0.0)[:, None]
    for rows in row_pieces(slice(0, len(anchor)), anchor.shape[1]):
        moved[rows] = anchor[rows].double() + share[rows] * moved[rows]
    return moved


def solve_table(student: Student, batches: Mapping[str, Sequence[Batch]], table: Table, real: Mask) -> None:
    """Solves a table."""
    name = f"{table.name}.weight"
    anchor = student.own(name)
    counts = [_lookups(student, group, table, len(anchor), real).to(anchor.device) for group in batches.values()]
    counts = [student.guidance.factor(task) * c / c.sum() for task, c in zip(batches, counts, strict=True)]
    experts = (student.expert(task, name) for task in batches)  # one after the other: tables are large
    lam = float(student.guidance.lam) / len(anchor)
    student.put({name: solved_table(anchor, experts, counts, lam)})


def _lookups(student: Student, batches: Sequence[Batch], table: Table, rows: int, real: Mask) -> Tensor:
    """The number of look-ups of each row of a table for real tokens: (rows,) in float64."""
    module, total = student.model.get_submodule(table.reader or table.name), None
    for batch in batches:
        args, options = calls([module], lambda batch=batch: student.family.features(student.model, batch))[0]  # type: ignore[misc]
        ids = _numbers(module, rows, args, options) if table.numbered else args[0]
        mask = real(batch)
        ids = ids if mask is None else ids.expand(mask.shape)[mask.to(ids.device)]
        counts = torch.bincount(ids.flatten(), minlength=rows).double()
        total = counts if total is None else total + counts
    assert total is not None
    return distributed.all_reduce(total)


def _numbers(module: nn.Module, rows: int, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The numbers of the rows that a table looks up in a call: it returns them if each row holds its number."""
    own = torch.arange(rows, dtype=torch.float64, device=next(module.parameters()).device)[:, None]
    found: Tensor = functional_call(module, {"weight": own}, args, options)
    return found[..., 0].long()


def solve_patches(student: Student, batches: Mapping[str, Sequence[Batch]], patches: Patches) -> None:
    """Solves a convolution and the positions of its patches together. The class token and its position, which are the
    same in every sample, become the mean over the experts."""
    kernel, positions = f"{patches.convolution}.weight", f"{patches.positions}.weight"
    tokens = [patches.class_token] if patches.class_token else []
    own, lam = {name: student.own(name) for name in (kernel, positions, *tokens)}, float(student.guidance.lam)
    means = {name: lam * tensor.double() for name, tensor in own.items()}
    total = lam + sum(student.guidance.factor(task) for task in batches)
    objective, skip = None, len(tokens)
    for task, group in batches.items():
        expert = {name: student.expert(task, name) for name in own}
        joined, anchor = (_joined(e[kernel], e[positions][skip:]) for e in (expert, own))
        measure = Measure(distributed)
        for batch in group:
            measure.add(_patch_rows(student, batch, patches.convolution), None, None)
        moments = measure.moments()
        if objective is None:
            objective = Objective(Affine(anchor, None), lam, False, distributed)
        s = task_weight(moments.norm, moments.tokens, student.guidance.task_weight)
        objective.add(moments, Affine(joined, None), s * student.guidance.factor(task))
        for name in own:
            means[name] += student.guidance.factor(task) * expert[name].double()
    assert objective is not None
    target = objective.closed().solution(distributed).weight
    width = own[kernel][0].numel()
    places = torch.cat([means[positions][:skip] / total, target[:, width:].T])
    student.put({kernel: target[:, :width].reshape(own[kernel].shape), positions: places})
    student.put({name: means[name] / total for name in tokens})


def _joined(kernel: Tensor, positions: Tensor) -> Tensor:
    """A convolution and the positions of its patches as one linear (width, pixels of a patch + patches)."""
    return torch.cat([kernel.flatten(1), positions.T], 1)


def _patch_rows(student: Student, batch: Batch, name: str) -> Tensor:
    """The inputs of that linear: the pixels of each patch, and its one-hot index."""
    convolution = student.model.get_submodule(name)
    forward = lambda: student.family.features(student.model, batch)  # noqa: E731
    pixels = calls([convolution], forward)[0][0][0]
    rows = unfold(pixels.float(), convolution.kernel_size, stride=convolution.stride).transpose(1, 2)  # type: ignore[arg-type]
    places = torch.eye(rows.shape[1], device=rows.device).expand(len(rows), -1, -1)
    return torch.cat([rows, places], 2).flatten(0, 1)
