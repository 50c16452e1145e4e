"""Checks before calibration that the blocks compute what the family's steps describe.

A few calibration samples run through one block of each kind. The inputs, outputs and residual sums of every step must
match the assumptions of the walk. Then the check verifies the fixed point of calibration without solving anything. The
block gets an input r_X that differs from the expert's r_E. Each step returns its target exactly:
W_t e + b_t + (r_E - r_X) / scale (alpha = beta = 1), or g z_E + b for a norm. The output must equal that of the
expert's block. This holds only if every path from the block's input to its output leads through the steps: a norm, a
branch or a factor outside of the steps breaks it. With r_X = r_E all targets are the expert's own outputs, so a student
that equals the expert stays unchanged.

The check does not change the model or draw random numbers. It compares sums of a few float32 numbers, whose errors are
a few units of 2^-24 relative to them. `RELATIVE` is over a thousand times larger; unknown paths change first digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from epmq_cli.calibrate.activations.hidden_state import HiddenState, calls, enter
from epmq_cli.calibrate.activations.routing import Router
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.activations.trace import Change, Trace, bypassed, traced
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.calibrate.norms import has_gain, normalised, unit
from epmq_cli.data.batching import Batch, split
from epmq_cli.errors import EpmqError, first_line, lacks_memory
from epmq_cli.families.family import Family
from epmq_cli.families.refusal import refused
from epmq_cli.families.structure import Linears, Norm, Section, Stack, Table, pooled
from epmq_cli.quantize.linalg import is_finite
from epmq_cli.runtime.block_offload import on_device

SAMPLES = 2  # samples that the check runs
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # rounding tolerances, relative to each number and to the root mean square
DRIFT = 0.25  # the size of r_X - r_E relative to r_E
INDEX = ("idx", "index", "layer_id", "layer_number")  # parts of the names of attributes that number the blocks


class _MismatchError(Exception):
    """A block does not compute what its steps describe."""


@torch.inference_mode()
def check_blocks(model: nn.Module, family: Family, batches: Mapping[str, Sequence[Batch]]) -> None:
    """Raises ModelError if the model, in its blocks or around them, does not compute what the family describes."""
    batch, where = next(iter(batches.values()))[0], type(model).__name__
    try:
        try:
            _check_model(model, family, split(batch, SAMPLES)[0])
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            _check_model(model, family, split(batch, 1)[0])
    except EpmqError:
        raise
    except _MismatchError as mismatch:
        raise refused(family, f"the self-check of {where} found that {mismatch}") from None
    except Exception as error:  # the code of a model may raise any error
        if lacks_memory(error):
            raise
        raise refused(family, f"the self-check cannot follow the blocks of {where} ({first_line(error)})") from error


def _check_model(model: nn.Module, family: Family, batch: Batch) -> None:
    batch = family.complete(model, batch)
    for stack in family.stacks(model):
        batch = _check_stack(model, family, stack, batch)


def _check_stack(model: nn.Module, family: Family, stack: Stack, batch: Batch) -> Batch:
    """Checks a stack. Returns the batch with the output that its readout passes to the next stack."""
    values: list[int] = []
    stream = enter(model, family, stack, [batch], ActivationStore(math.inf), values)[0]
    first = stream.load()
    if not is_finite(first):
        return batch  # the walk raises an error that names the tensor
    arguments, options = stream.calls[0]
    kinds = [_kind(block, call) for block, call in zip(stack.blocks, stream.calls, strict=True)]
    last = max(map(kinds.index, kinds))
    for index, block in enumerate(stack.blocks[: last + 1]):
        with on_device(block.module):
            if kinds.index(kinds[index]) == index:
                _Check(block, stream, stack, family.repeated).run()
            stream.finish(block.module)
    stream.calls = []
    _Check(stack.readout, stream, stack).run()
    if not values:  # `enter` leaves them out for a single block
        output = stack.blocks[0].module(first, *arguments, **options)
        values = [len(output) if isinstance(output, tuple) else 0]
    return _check_around(model, family, stack, batch, first, values[0])


def _kind(block: Section, call: Any) -> tuple[Any, ...]:
    """The kind of a block: its steps, the shapes of its tensors, the settings of its modules, and its arguments."""
    settings = [
        (name, type(module).__name__, key, value)
        for name, module in block.module.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and not any(part in key for part in INDEX)
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.module.state_dict().items()]
    arguments = [
        (key, type(value).__name__, tuple(value.shape) if isinstance(value, Tensor) else None)
        for key, value in [*enumerate(call[0]), *call[1].items()]
    ]
    return (block.steps, tuple(settings), tuple(shapes), tuple(map(str, arguments)))


class _Check:
    """Checks one section, block or readout, with the hidden state at its input. `repeated`: see Family."""

    def __init__(self, section: Section, stream: HiddenState, stack: Stack, repeated: tuple[str, ...] = ()) -> None:
        self.section, self.stream, self.stack, self.repeated = section, stream, stack, repeated
        self.is_block = section is not stack.readout
        self.hidden = stream.hidden
        self.router = Router()
        self.plain = self._pass(self.hidden)

    def run(self) -> None:
        """Raises _MismatchError if the section does not compute what its steps describe."""
        if not self.section.steps or not is_finite(self.plain.output):
            return
        self._check_order()
        for number, step in enumerate(self.section.steps):
            if isinstance(step, Linears):
                self._check_linears(step, number)
            else:
                self._check_norm(step)
        self._check_fixed_point()
        if self.is_block and (token := self.stack.lone_token) is not None:
            for step in self.section.steps:
                self._check_mixing(step, token)

    def _pass(self, hidden: Tensor, change: Change | None = None) -> Trace:
        """Runs the section on this input. `change` replaces outputs of its modules."""
        router = self.router if change is None else Router(self.router)
        fresh = replace(self.stream, hidden=hidden, forward_pass=None, handle=None, router=router)
        with traced(self.section, change, hidden) as trace:
            fresh.finish(self.section.module)
        trace.output = fresh.hidden
        return trace

    def _check_order(self) -> None:
        """Checks that every module is called once, in the order of the steps."""
        calls = self.plain.calls
        for name in self.section.modules:
            if name not in calls:
                raise _MismatchError(f"{self._name(name)} is never called")
            if calls.count(name) > 1 and name not in self.repeated:
                raise _MismatchError(f"{self._name(name)} is called {calls.count(name)} times, not once")
        number = {name: index for index, step in enumerate(self.section.steps) for name in _names(step)}
        for before, after in pairwise(dict.fromkeys(calls)):
            if number[after] < number[before]:
                raise _MismatchError(f"{self._name(after)} is called after {self._name(before)}, not before it")

    def _check_linears(self, step: Linears, number: int) -> None:
        """Checks that linears read one input with the expected tokens, compute W x + b, and write to the stream."""
        inputs, first = self.plain.inputs, step.names[0]
        for name in step.names:
            module, output = self.section.module.get_submodule(name), self.plain.outputs[name]
            if not torch.equal(inputs[name], inputs[first]):
                raise _MismatchError(f"{self._name(name)} does not have the same input as {self._name(first)}")
            weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
            if weight.shape != (output.shape[-1], inputs[name].shape[-1]):
                raise _MismatchError(f"the weight of {self._name(name)} does not have the shape (outputs, inputs)")
            self._compare(output, linear(inputs[name], weight, bias), f"{self._name(name)} does not compute W x + b")
        tokens, mask = inputs[first].shape[:-1], self.stream.memory if step.memory else self.stream.mask
        expected = mask.shape if mask is not None else tokens if step.memory else self.hidden.shape[:-1]
        known = tokens == expected or (mask is None and tokens.numel() == expected.numel())  # the latter in windows
        if self.is_block and step.route is None and not known:
            raise _MismatchError(f"{self._name(first)} reads (samples, tokens) {list(tokens)}, not {list(expected)}")
        self._check_added(step, number)

    def _check_added(self, step: Linears, number: int) -> None:
        """Checks that the output is added to the residual stream, or is the input of the norm behind it. For parallel
        parts, mixtures of experts and windows that end behind it, the fixed point is the check."""
        if step.parallel or step.route is not None:
            return
        rest, name = self.section.steps[number + 1 :], step.names[0]
        behind = self.plain.inputs[_names(rest[0])[0]] if rest else self.plain.output
        if step.stream is not None:
            expected = self.plain.inputs[step.stream] + step.scale * self.plain.outputs[name]
            problem = f"{self._name(name)} is not added to the input of {self._name(step.stream)}"
            if rest or behind.shape == expected.shape:
                self._compare(behind, expected, problem, self.plain.inputs[step.stream])
        elif len(step.names) == 1 and rest and isinstance(rest[0], Norm):
            problem = f"{self._name(rest[0].name)} does not read the output of {self._name(name)}"
            self._compare(behind, self.plain.outputs[name], problem)

    def _check_norm(self, step: Norm) -> None:
        """Checks that the norm computes gain * z + bias, where z is its normalized input."""
        norm = self.section.module.get_submodule(step.name)
        if not has_gain(norm):
            return
        inputs, output = (
            tensor.flatten(0, -2) for tensor in (self.plain.inputs[step.name], self.plain.outputs[step.name])
        )
        scaled = normalised(norm, inputs) * (norm.get_parameter("weight") + unit(norm))
        bias = getattr(norm, "bias", None)
        problem = f"{self._name(step.name)} does not compute a gain times its normalized input"
        self._compare(output, scaled if bias is None else scaled + bias, problem, scaled)

    def _check_fixed_point(self) -> None:
        """Checks that a section whose steps return their targets has the expert's output for any input."""
        drift = DRIFT * self.hidden.roll(1, -1)
        trace = self._pass(self.hidden + drift, self._target)
        streams = [step.stream for step in self.section.steps if isinstance(step, Linears) and step.stream]
        problem = f"{self._name('')} has a path from its input to its output that is not in its steps"
        if not self.is_block:
            self._compare(trace.output, self.plain.output, problem)
            return
        terms = self.hidden.abs() + drift.abs()
        for name in streams:
            terms = terms + self.plain.inputs[name].abs().reshape(terms.shape)
        # outputs that are normalized before they are added do not compensate drift
        self._compare(trace.output, self.plain.output + (0 if streams else drift), problem, terms)

    def _target(self, name: str, output: Tensor, trace: Trace) -> Tensor:
        """The calibration target of this module, with the plain pass as the expert's."""
        step = next(step for step in self.section.steps if name in _names(step))
        target = self.plain.outputs[name]
        if isinstance(step, Linears) and step.stream is not None:
            drift = (self.plain.inputs[step.stream] - trace.inputs[step.stream]) / step.scale
            if step.route is not None:
                tokens, _ = self.router[step.route.router].tokens(step.route.expert, None)
                drift = drift.flatten(0, -2)[tokens].reshape(target.shape)
            target = target + drift
        return target

    def _check_mixing(self, step: Linears | Norm, token: int) -> None:
        """Checks that only the modules of `mixing` mix tokens. Of the other modules, only outputs for the token that is
        read out may affect it."""
        mixing = step.mixing if isinstance(step, Linears) else (step.name,) if step.mixing else ()
        local = [name for name in _names(step) if name not in mixing]

        def change(name: str, output: Tensor, trace: Trace) -> Tensor:
            if name not in local or output.ndim < 3:
                return output
            other = 1 - output
            other[:, token] = output[:, token]
            return other

        if local:
            trace = self._pass(self.hidden, change)
            problem = f"the output of {self._name(local[0])} for one token reaches other tokens"
            self._compare(trace.output[:, token], self.plain.output[:, token], problem)

    def _compare(self, actual: Tensor, expected: Tensor, problem: str, terms: Tensor | None = None) -> None:
        """Raises _MismatchError if two tensors differ by more than rounding. `terms`: the terms of their sums."""
        if actual.shape != expected.shape or not _close(actual, expected, terms):
            raise _MismatchError(problem)

    def _name(self, local: str) -> str:
        return self.section.name(local).rstrip(".")


def _close(actual: Tensor, expected: Tensor, terms: Tensor | None = None) -> bool:
    """Whether two tensors are equal up to the rounding of numbers of the size of `expected` and `terms`."""
    size = expected.abs() if terms is None else expected.abs() + terms.abs()
    allowed = RELATIVE * size + ABSOLUTE * size.square().mean().sqrt()
    return bool(((actual - expected).abs() <= allowed).all())


def _names(step: Linears | Norm) -> tuple[str, ...]:
    return step.names if isinstance(step, Linears) else (step.name,)


def _check_around(model: nn.Module, family: Family, stack: Stack, batch: Batch, hidden: Tensor, values: int) -> Batch:
    """Checks the model in front of, between and behind its blocks. To check between and behind, the blocks return their
    inputs. Returns the batch with the output that the readout passes to the next stack."""
    for part in stack.stem:
        if isinstance(part, Table):
            calls([model.get_submodule(part.reader or part.name)], lambda: family.features(model, batch))
    own = stack.readout.module(hidden)
    with bypassed(stack.blocks, values) as block_inputs:
        features = family.features(model, batch)
    for index, tensor in enumerate(block_inputs):
        if not torch.equal(tensor, hidden):
            raise _MismatchError(f"the model changes the hidden state in front of {stack.blocks[index].prefix}")
    if stack.handed is not None:
        batch = {**batch, stack.handed: own}
        rows = family.features(model, batch)
    else:
        mask = stack.mask(batch)
        rows = pooled(own, stack.read_token, mask) if stack.pools else real_tokens(own, mask)
    if rows.shape != features.shape or not _close(features, rows):
        raise _MismatchError(f"the model does not read its last block only through {', '.join(_readout_names(stack))}")
    return batch


def _readout_names(stack: Stack) -> list[str]:
    return [stack.readout.name(name) for name in stack.readout.modules] or ["its first token"]
