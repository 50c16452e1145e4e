"""Refines a quantized block by signed gradient steps on the error of its output (AutoRound,
https://arxiv.org/abs/2309.05516).

    error = sum_t c_t mean || B(X_t) - Y_t ||^2  /  sum_t c_t mean || Y_t ||^2  +  lam || Q - A ||^2 / || A ||^2

B is the student's block, X_t its inputs behind the quantized blocks in front of it, Y_t the output of the teacher's
block on the teacher's own inputs, and the means are over the tokens of task t. c_t = s_t n_t, with s_t as in
moments.py, measured on Y_t, and n_t the number of tokens. The steps use four fifths of the samples. The result is the
iterate with the least error on the last fifth, among those that are measured, which include the start. The quantizer
has seen all samples, so this choice favours the start.

In contrast to the walk's sums, gradients are sums in float32: their last bits depend on the number of samples that go
through the block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from epmq_cli.calibrate.block_refinement import BlockPart, BlockProblem, BlockRecord, RefinedBlock
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.moments import Measure, real_tokens, task_weight
from epmq_cli.calibrate.norms import has_gain, unit
from epmq_cli.data.batch_order import own_numbers, shuffled
from epmq_cli.families.structure import Norm
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.rounding import Learned, LearnedRounding, LearnedVector, RoundingOptions
from epmq_cli.runtime import distributed


@dataclass(frozen=True)
class BlockDescent:
    """A BlockRefiner; see `Blocks` for the options. A learning rate of 0 fixes what it is of."""

    iterations: int
    every: int
    held_out: bool
    batch_size: int
    rounding: RoundingOptions
    norm_lr: float
    bias_lr: float
    lam: float
    seed: int

    @torch.inference_mode(False)
    @torch.no_grad()
    def refine(self, problem: BlockProblem) -> RefinedBlock:
        """See BlockRefiner."""
        learned, errors = self._learned(problem), BlockErrors(problem, self.held_out)
        best = [part.state() for part in learned.values()]
        start = found = errors.measure(_values(learned))
        iteration = 0  # of the best state
        for step in range(1, self.iterations + 1):
            gradients = errors.gradients(_values(learned), step - 1, self.seed)
            self._add_anchor(problem, learned, gradients)
            for name, part in learned.items():
                part.step(gradients[name], 1 - (step - 1) / self.iterations)
            if step % self.every == 0 or step == self.iterations:
                measured = errors.measure(_values(learned))
                if measured.held < found.held:
                    best, found, iteration = [part.state() for part in learned.values()], measured, step
        for part, state in zip(learned.values(), best, strict=True):
            part.restore(state)
        record = BlockRecord(
            name=problem.block.prefix,
            iteration=iteration,
            error_before=start.fitted,
            error=found.fitted,
            held_out_before=start.held,
            held_out=found.held,
        )
        return RefinedBlock(_put(problem, learned) if iteration else {}, record)

    def _learned(self, problem: BlockProblem) -> dict[str, Learned]:
        """The learned tensors by the block's own names."""
        block, dtype = problem.block, problem.student.dtype
        learned: dict[str, Learned] = {}
        for name, weight in problem.weights.items():
            learned[f"{name}.weight"] = LearnedRounding(weight, problem.targets[name], self.rounding)
            bias = getattr(block.module.get_submodule(name), "bias", None)
            if self.bias_lr and bias is not None:
                learned[f"{name}.bias"] = LearnedVector(bias.detach().clone(), self.bias_lr, dtype)
        for norm in (step.name for step in block.steps if isinstance(step, Norm)):
            module = block.module.get_submodule(norm)
            if self.norm_lr and has_gain(module):
                for name, parameter in module.named_parameters(recurse=False):
                    added = unit(module) if name == "weight" else 0.0
                    learned[f"{norm}.{name}"] = LearnedVector(parameter.detach().clone(), self.norm_lr, dtype, added)
        return learned

    def _add_anchor(
        self, problem: BlockProblem, learned: Mapping[str, Learned], gradients: Mapping[str, Tensor]
    ) -> None:
        """Adds the gradient of lam || Q - A ||^2 / || A ||^2, over all linears."""
        if not self.lam:
            return
        energy = sum(float(anchor.square().sum()) for anchor in problem.anchors.values())
        for name, anchor in problem.anchors.items():
            own = gradients[f"{name}.weight"]
            own += (2 * self.lam / max(energy, 1e-30)) * (learned[f"{name}.weight"].value() - anchor)


@dataclass(frozen=True)
class Errors:
    """The relative errors on the samples that are fitted and on those that choose the result."""

    fitted: float
    held: float


@dataclass(frozen=True)
class _Rows:
    """A part, its mask, and for each of its real tokens: its weight, as in the walk, and whether its sample is held
    out (tokens,)."""

    part: BlockPart
    mask: Tensor | None
    weights: Tensor
    held: Tensor

    @classmethod
    def of(cls, part: BlockPart, token: int | None, guidance: Guidance, held_out: bool) -> _Rows:
        with part.student.loaded():
            hidden, mask = part.student.hidden, part.student.mask
            outside = (part.held & held_out).to(hidden.device).view(-1, *[1] * (hidden.ndim - 1))
            held = real_tokens(outside.expand(*hidden.shape[:-1], 1), mask)[:, 0]
            weights = part.student.weights(token, guidance)
            own = torch.ones_like(held, dtype=hidden.dtype) if weights is None else weights
            return cls(part, None if mask is None else mask.clone(), own, held)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Loads the activations inside the context."""
        with self.part.student.loaded(), self.part.teacher.loaded():
            yield

    @property
    def target(self) -> Tensor:
        """The teacher's output for the real tokens (tokens, width)."""
        return real_tokens(self.part.teacher.hidden, self.mask)


class BlockErrors:
    """The errors of a block and their gradients, for weights, norms and biases by the block's own names.

    A step uses one chunk of each task. Of several processes, the one that has it computes the gradients.
    """

    def __init__(self, problem: BlockProblem, held_out: bool = True) -> None:
        self._held_out = held_out
        self._module, guidance = problem.block.module, problem.student.guidance
        self._chunks = {
            task: [
                [_Rows.of(part, problem.token, guidance, held_out) for part in chunk]
                for batch in group
                for chunk in batch
            ]
            for task, group in problem.parts.items()
        }
        self._numbers = {task: own_numbers([*map(len, group)]) for task, group in problem.parts.items()}
        shares = {task: self._share(task, guidance) for task in self._chunks}
        total = sum(share * energy for share, energy in shares.values())
        self._factors = {task: share / total if total > 0 else 0.0 for task, (share, _) in shares.items()}

    def measure(self, tensors: Mapping[str, Tensor]) -> Errors:
        """The errors of the whole block, over all samples."""
        errors = []
        for task, chunks in self._chunks.items():
            sums = torch.zeros(2, 2, dtype=torch.float64)  # of errors and weights; fitted and held out
            for rows in (rows for chunk in chunks for rows in chunk):
                error = self._error(rows, tensors)
                for column, chosen in enumerate((~rows.held, rows.held)):
                    weights = rows.weights[chosen].double()
                    sums[:, column] += torch.stack([weights @ error[chosen].double(), weights.sum()]).cpu()
            total, weight = distributed.all_reduce(sums)
            errors.append(self._factors[task] * total / weight.clamp(min=1e-30))
        fitted, held = torch.stack(errors).sum(0).tolist()
        return Errors(fitted, held if self._held_out else fitted)

    def gradients(self, tensors: Mapping[str, Tensor], step: int, seed: int) -> dict[str, Tensor]:
        """The gradients of the error on the chunks of a step, in float64."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
        for task, numbers in self._numbers.items():
            order = shuffled(len(numbers), seed, task, step // len(numbers))
            number = numbers[order[step % len(numbers)]]
            for loss in () if number is None else self._losses(task, self._chunks[task][number], leaves):
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
        return {name: distributed.all_reduce(gradient) for name, gradient in total.items()}

    def _losses(self, task: str, chunk: Sequence[_Rows], leaves: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The error on the fitted samples of a chunk, part by part, with gradients."""
        chosen = [rows.weights * ~rows.held for rows in chunk]
        total = sum(float(weights.sum()) for weights in chosen)
        for rows, weights in zip(chunk, chosen, strict=True):
            if weights.any():
                with torch.enable_grad():
                    loss = self._factors[task] / total * weights @ self._error(rows, leaves)
                yield loss

    def _error(self, rows: _Rows, tensors: Mapping[str, Tensor]) -> Tensor:
        """The squared error of each real token (tokens,)."""
        with rows.loaded():
            args, named = _usable(rows.part.student.call())
            output = functional_call(self._module, dict(tensors), args, named)
            hidden = output[0] if isinstance(output, tuple) else output
            return (real_tokens(hidden, rows.mask) - rows.target).square().sum(-1)

    def _share(self, task: str, guidance: Guidance) -> tuple[float, float]:
        """c_t, and the mean energy of the targets of a task."""
        measure, energy = Measure(distributed), torch.zeros((), dtype=torch.float64)
        for rows in (rows for chunk in self._chunks[task] for rows in chunk):
            with rows.loaded():
                target = rows.target
                measure.add(target, None, rows.weights)
                energy += float(rows.weights @ target.square().sum(-1))
        moments, total = measure.moments(), float(distributed.all_reduce(energy))
        s = task_weight(moments.norm, moments.tokens, guidance.task_weight)
        return s * moments.tokens * guidance.factor(task), total / moments.tokens if moments.tokens > 0 else 0.0


def _values(learned: Mapping[str, Learned]) -> dict[str, Tensor]:
    return {name: part.value() for name, part in learned.items()}


def _put(problem: BlockProblem, learned: Mapping[str, Learned]) -> dict[str, QuantizedWeight]:
    """Puts the learned tensors into the student. Returns the weights of the linears."""
    problem.student.put({problem.block.name(name): part.value() for name, part in learned.items()})
    roundings = {name: learned[f"{name}.weight"] for name in problem.weights}
    return {name: part.weight() for name, part in roundings.items() if isinstance(part, LearnedRounding)}


def _usable(value: Any) -> Any:
    """The arguments of a block, for a pass with gradients: copies, because tensors of inference mode cannot take part
    in it, and activations leave the memory before the backward pass."""
    if isinstance(value, Tensor):
        return value.clone() if torch.is_grad_enabled() else value
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(map(_usable, value))
    return {name: _usable(part) for name, part in value.items()} if isinstance(value, dict) else value
