"""Counts what a run does: linears by the inputs that they share, tokens, and operations of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.config.schema import GENERATE, Harness
from epmq_cli.data.batching import Batch
from epmq_cli.data.held_out import HOLD
from epmq_cli.families.structure import Linears, Section
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.inspection.operations import CALLS, Operations, plus, times
from epmq_cli.inspection.planned import IMAGE, PATCH, Planned
from epmq_cli.inspection.refinement_work import refinement_work
from epmq_cli.pipeline.calibration import solves_heads
from epmq_cli.pipeline.job import Job
from epmq_cli.quantize.mixed_precision import MixedPrecision
from epmq_cli.quantize.none import NoQuantizer

SEARCHED = 40
"""Operations of the search for scales, for each weight and column of its group: the candidates of scale_search.py."""
GROUP = 64


@dataclass(frozen=True)
class Group:
    """Linears of one step, which read the same inputs: (width) to (outs), all together. `stream`: whether they write to
    the residual stream."""

    width: int
    outs: int
    stream: bool
    count: int


@dataclass
class Work:
    """The sizes behind the estimates. `blocks`: the groups of each block. `dense`: the readouts' groups. `tokens` and
    `samples`: of the calibration batches, padding included; `longest`: of one sample; `tests`: of the test samples by
    stage."""

    blocks: list[list[Group]]
    dense: list[Group]
    parameters: int
    tensors: int
    quantized: int
    largest_block: int
    tokens: int
    batches: int
    samples: int
    samples_bytes: int
    longest: int
    tests: int
    vocabulary: int
    stages: dict[str, Operations] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """The groups of all blocks."""
        return [group for block in self.blocks for group in block]

    @property
    def forward(self) -> float:
        """Operations for one token in one forward pass."""
        attention = sum(4 * self.longest * min(group.width for group in block) for block in self.blocks if block)
        return attention + sum(2 * group.width * group.outs for group in [*self.groups, *self.dense])

    @property
    def widest(self) -> Group:
        """The group with the most inputs."""
        return max(self.groups, key=lambda group: (group.width, group.outs))


def work_of(plan: Planned, job: Job, model: nn.Module) -> Work:
    """The work of a run whose model is known."""
    sections = job.family.blocks(model)
    blocks = [list(_groups(block)) for block in sections]
    dense = [group for stack in job.family.stacks(model) for group in _groups(stack.readout)]
    config = plan.base.config if plan.base is not None else {}
    tensors = [tensor for group in plan.batches.values() for batch in group for tensor in batch.values()]
    lengths = [batch_tokens(batch, config) for group in plan.batches.values() for batch in group]
    longest = max((tokens // max(samples, 1) for samples, tokens in lengths), default=1)
    tests = sum(plan.tests.values())
    language = isinstance(job.family.tasks, LanguageModel)
    table = config.get("vocab_size") or 0
    work = Work(
        blocks=blocks,
        dense=dense,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tensors=len(list(model.parameters())),
        quantized=sum(group.width * group.outs for block in blocks for group in block),
        largest_block=max(sum(p.numel() for p in block.module.parameters()) for block in sections),
        tokens=job.calib.views * sum(tokens for _, tokens in lengths),
        batches=job.calib.views * len(lengths),
        samples=job.calib.views * sum(samples for samples, _ in lengths),
        samples_bytes=job.calib.views * sum(tensor.nbytes for tensor in tensors),
        longest=longest,
        tests=tests if language else tests * longest,
        vocabulary=table if language else 0,
    )
    work.stages = _stages(plan, job, work)
    return work


def _groups(section: Section) -> Iterator[Group]:
    for step in section.steps:
        if isinstance(step, Linears):
            shapes = [section.module.get_submodule(name).get_parameter("weight").shape for name in step.names]
            yield Group(shapes[0][1], sum(shape[0] for shape in shapes), step.stream is not None, len(shapes))


def batch_tokens(batch: Batch, config: Mapping[str, Any]) -> tuple[int, int]:
    """The samples of a batch, and their tokens in the model."""
    pixels = batch.get("pixel_values")
    if pixels is None:
        ids = next(iter(batch.values()))
        return len(ids), ids.numel()
    own = config.get("vision_config") or config
    patch = own.get("patch_size", PATCH) if isinstance(own, dict) else PATCH
    return len(pixels), len(pixels) * ((pixels.shape[-1] or IMAGE) // patch) ** 2 + len(pixels)


def _stages(plan: Planned, job: Job, work: Work) -> dict[str, Operations]:
    """The operations of each stage, by its name in metrics.json."""
    files = [info.size for folder in (plan.base, *plan.experts.values()) if folder for info in folder.infos.values()]
    merged = sum(prod(plan.source.shape(name)) for name in plan.source.names) if plan.source else 0
    experts = len(job.suite.members)
    blocks, forward = work.blocks, work.forward
    linears = sum(group.count for group in work.groups)
    scored = work.tests * (forward + 2 * work.vocabulary * (blocks[0][0].width if blocks else 0))
    batches = work.tests / max(work.longest, 1) / max(job.evaluation.batch_size, 1)
    decoding = 0.0 if work.vocabulary else plan.sample_seconds * sum(plan.tests.values())
    once = Operations(single=scored, calls=CALLS * linears * batches, seconds=decoding)
    count = 0 if isinstance(job.evaluation, Harness) else len({"base", "experts"} & {*job.evaluation.stages})
    stages = {"read": Operations(bytes=2 * sum(files))}
    stages["score base and experts"] = times(once, count)
    teaching = job.family.answers or job.calib.source == GENERATE or solves_heads(job)
    teach = Operations(single=work.tokens * forward, calls=CALLS * linears * work.batches)
    stages["teach"] = times(teach, int(bool(teaching)))
    stages["merge"] = Operations(single=20.0 * merged * (experts + 1), bytes=2.0 * merged)
    stages["score merged"] = times(once, int("merged" in job.evaluation.stages))
    walk = _walk(job, work, experts, linears)
    stages["refine"] = refinement_work(job, work, walk, linears)
    stages["calibrate and quantize"] = walk
    stages["pack"] = Operations(bytes=2.0 * work.parameters)
    stages["score quantized"] = times(once, int("quantized" in job.evaluation.stages))
    return stages


def _walk(job: Job, work: Work, experts: int, linears: int) -> Operations:
    """One walk through the blocks, times the number of walks: sweeps, and one for mixed widths."""
    guidance, done = job.guidance, Operations()
    if not guidance.needs_inputs and not job.blocks:
        return Operations(single=20.0 * work.quantized)
    models = 2 if guidance.teaches else 1
    done.single += models * work.tokens * work.forward
    done.calls += 2 * models * CALLS * linears * work.batches
    for group in [*work.groups, *(work.dense if guidance.readout else [])]:
        _add_group(done, group, work.tokens, experts, guidance)
    trials = 1 + 3 * len(guidance.open)
    walks = guidance.sweeps + int(isinstance(job.quantizer, MixedPrecision)) + (trials if guidance.open else 0)
    return plus(times(done, walks), _sensitivity(job, work, linears))


def _sensitivity(job: Job, work: Work, linears: int) -> Operations:
    """The forward passes with one group of linears after the other rounded."""
    if not isinstance(job.quantizer, MixedPrecision) or job.quantizer.sensitivity == "objective":
        return Operations()
    passes, share = 1 + len(work.groups), 1 / (HOLD * job.calib.views)
    single = share * work.tokens * work.forward
    return times(Operations(single=single, calls=CALLS * linears * share * work.batches), passes)


def _add_group(done: Operations, group: Group, tokens: int, experts: int, guidance: Guidance) -> None:
    """Moments, the objective, two factors of H, the solution, GPTQ and the losses, as in calibrate/ and quantize/. With
    held-out samples two objectives, and a third factor and another solution for the step."""
    width, outs, teaches = group.width, group.outs, guidance.teaches
    objectives = experts * (2 if guidance.safe else 1)
    square, product = float(width * width), float(width * outs)
    done.single += tokens * square
    by_drift = teaches and not group.stream and 4 * outs > 3 * width
    if by_drift:
        done.single += tokens * 3 * square + objectives * 4 * square * outs
    elif teaches:
        done.single += tokens * 4 * product
    done.single += objectives * 2 * square * outs
    done.single += 7 * square * outs + SEARCHED * product * GROUP
    done.double += square * width + 2 * square * outs
    if guidance.safe:
        done.double += square * width / 2 + 4 * square * outs


def sequential(job: Job) -> bool:
    """Whether linears are quantized at all."""
    return not isinstance(job.quantizer, NoQuantizer)


def step_bytes(groups: Sequence[Group]) -> int:
    """The bytes of a token inside a waiting pass through a block: the residual stream, the input of its norm, and the
    inputs and outputs around the widest step."""
    width = min(group.width for group in groups)
    inner = max([group.width for group in groups] + [group.outs + width for group in groups if not group.stream])
    return 4 * (2 * width + inner)
