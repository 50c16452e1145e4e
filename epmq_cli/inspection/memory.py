"""Estimates the peak of a run's memory, of the host and of a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from epmq_cli.config.schema import bytes_of
from epmq_cli.families.family import outside_blocks
from epmq_cli.inspection.planned import Planned
from epmq_cli.inspection.work import Group, Work, step_bytes
from epmq_cli.pipeline.calibration import refined_bytes, reserved_bytes, sums_wait
from epmq_cli.pipeline.job import Job
from epmq_cli.refine.distill import Distill
from epmq_cli.runtime.block_offload import large
from epmq_cli.runtime.memory import status

SUMMED = 8, 16
"""Bytes for each weight of a group while its moments are summed: the anchor and the expert; and S and X'P in float64,
twice with held-out samples."""
FACTORED = 28
"""Bytes for each weight of a group while H is factored: S and the optimum in float64, anchor and merge, and a piece."""
SOLVED = 52
"""Bytes for each weight of a group while it is quantized: S, the optimum and the target in float64, anchor, merge,
target, its copy in the order of columns, what is left of it and the result in float32, and the codes."""
TABLE = 20
"""Bytes for each weight of an embedding that is solved: its sum in float64, anchor, expert and result in float32."""
ROWS = 6
"""Copies of a batch's inputs of the widest linear, in float32: student, teacher, both without held-out samples, their
difference, and one inside the block."""
TRAINED = 24
"""Bytes for each weight that refine=distill holds: the start, the best, the gradient, and two states of the optimizer,
beside the weight itself."""


def memory_content(plan: Planned, job: Job, model: nn.Module, work: Work) -> dict[str, int]:
    """The parts of the peak in bytes, as a run's metrics.json counts them: `host`, and `device` on a GPU.

    `files`: the pages of mapped weight files, which the system can take back at any time. `student`: its weights on the
    device that computes. `waiting`: what calibration holds in the host's memory if the student is not on the GPU.
    """
    folders = [folder for folder in (plan.base, *plan.experts.values()) if folder is not None]
    on_gpu, place = job.device.type == "cuda", job.calib.student
    whole = 4 * work.parameters
    student = 0 if place == "disk" else whole
    merged = plan.dtype.itemsize * sum(tensor.numel() for tensor in _merged(plan, model))
    calibration = calibration_bytes(plan, job, model, work)
    scoring = _scoring_bytes(job, work)
    training = TRAINED * work.parameters if isinstance(job.refine, Distill) else 0
    content = {"process": status("VmRSS") or 0, "files": _files(folders) + merged}
    host = student if place == "cpu" else 0
    if on_gpu and place != "memory":
        outside = _outside(job, model)
        student = 4 * (work.parameters - work.quantized + work.largest_block) - sum(outside)
        scoring += max(outside, default=0)
        content["waiting"] = max(_waiting_bytes(job, work), TABLE * max(outside, default=0) // 4)
        host += content["waiting"]
    content |= {"student": student, "calibration": calibration, "scoring": scoring, "training": training}
    working = max(calibration, scoring, training)
    content["host"] = content["process"] + content["files"] + (host if on_gpu else student + working)
    content["device"] = student + working if on_gpu else 0
    return content


def _files(folders: list[Any]) -> int:
    return sum(info.size for folder in folders for info in folder.infos.values())


def _merged(plan: Planned, model: nn.Module) -> list[torch.Tensor]:
    names = set(plan.source.names) if plan.source is not None else set()
    return [tensor for name, tensor in model.state_dict().items() if name in names]


def _outside(job: Job, model: nn.Module) -> list[int]:
    """The bytes of the large embeddings and output layers that are not on the GPU; tied ones count once."""
    modules = large(outside_blocks(model, job.family))
    return list({id(module.weight): 4 * module.weight.numel() for module in modules}.values())


def _waiting_bytes(job: Job, work: Work) -> int:
    """The sums H of all tokens, with `guidance.safe` also those of two parts of them."""
    return (3 if job.guidance.safe else 1) * 8 * work.widest.width**2 * int(job.guidance.needs_inputs)


def calibration_bytes(plan: Planned, job: Job, model: nn.Module, work: Work) -> int:
    """Samples, the matrices of the group that needs most, the rows of a batch, the teacher's block, and the experts'
    blocks and activations of all samples up to calib.memory."""
    batches = {task: group * job.calib.views for task, group in plan.batches.items()}
    reserved = reserved_bytes(job, model, batches)
    if not job.guidance.needs_inputs:
        return reserved
    rows = 4 * ROWS * work.widest.width * (work.tokens // max(work.batches, 1))
    teacher = 4 * work.largest_block * int(job.guidance.teaches)
    budget = max(0, bytes_of("calib.memory", job.calib.memory) - reserved)
    solved = max(group_bytes(job, group) for group in work.groups)
    fixed = work.samples_bytes + refined_bytes(job, work.largest_block)
    return fixed + solved + rows + teacher + int(min(budget, activation_bytes(job, work)))


def group_bytes(job: Job, group: Group) -> int:
    """The most bytes of a group's matrices: of its inputs and of its weights, while moments are summed, while H is
    factored, and while it is quantized. See moments.py, objective.py, quadratic.py and gptq.py."""
    kinds = 2 if job.guidance.safe else 1
    sums = 3 if job.guidance.teaches and not group.stream and 4 * group.outs > 3 * group.width else 1
    square, weights = 8 * group.width**2, group.width * group.outs
    summed = kinds * (sums if sums_wait(job) else sums + 1) * square + (SUMMED[0] + kinds * SUMMED[1]) * weights
    return max(summed, int(2.5 * square) + FACTORED * weights, int(1.5 * square) + SOLVED * weights)


def activation_bytes(job: Job, work: Work) -> int:
    """The activations that wait in front of the steps of a block, of the student and the teachers, and the experts'
    blocks."""
    models = 2 if job.guidance.teaches else 1
    token = max(step_bytes(block) for block in work.blocks)
    return models * work.tokens * token + 4 * work.largest_block * len(job.suite.members) * int(models == 2)


def _scoring_bytes(job: Job, work: Work) -> int:
    """The activations of a batch, and the logits of a language model with their probabilities."""
    tokens = min(job.evaluation.batch_size * work.longest, work.tests)
    width = max(group.outs for group in work.groups)
    return tokens * 4 * (3 * width + 2 * work.vocabulary)
