"""A check before calibration: do the blocks compute what their steps say?

A few calibration samples go through one block of each kind. Every step must read, give and add what the walk assumes.
Then the fixed point of calibration is tried without solving anything: the block gets another input than the expert's
(r_X for r_E), each step is made to give its target exactly, W_t e + b_t + (r_E - r_X) / scale (alpha = beta = 1) or
g z_E + b, and the block must give what the expert's block gives. It does so only if every path from the
block's input to its output leads through the steps: a norm, a branch or a factor that no step knows breaks it. With
r_X = r_E all targets are the expert's own outputs, so that a student equal to the expert stays as it is.

Nothing here changes the model or draws a random number. All sums are of float32 numbers that are known one by one, so
their errors are a few units of 2^-24 relative to the numbers; `RELATIVE` is a thousand times that and more, and a path
that is not known shows in the first digits.
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
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.activations.trace import Change, Trace, bypassed, traced
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.calibrate.norms import has_gain, normalised, unit
from epmq_cli.data.batching import Batch, split
from epmq_cli.errors import EpmqError, first_line, lacks_memory
from epmq_cli.families.family import Family
from epmq_cli.families.refusal import refused
from epmq_cli.families.structure import MEAN, Linears, Norm, Section, Stack, Table, pooled
from epmq_cli.quantize.linalg import is_finite

SAMPLES = 2  # that are looked at
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # errors that are taken for rounding: of each number, and of their root mean square
DRIFT = 0.25  # of the other input, relative to the expert's
INDEX = ("idx", "index", "layer_id", "layer_number")  # in the names of attributes that number the blocks


class _FoundError(Exception):
    """What a block does otherwise than its steps say."""


@torch.inference_mode()
def check_blocks(model: nn.Module, family: Family, batches: Mapping[str, Sequence[Batch]]) -> None:
    """ModelError where the model's blocks, or what is around them, do not compute what the family's steps say."""
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
    except _FoundError as found:
        raise refused(family, f"the self-check of {where} found that {found}") from None
    except Exception as error:  # the code of a model may do anything
        if lacks_memory(error):
            raise
        raise refused(family, f"the self-check cannot follow the blocks of {where} ({first_line(error)})") from error


def _check_model(model: nn.Module, family: Family, batch: Batch) -> None:
    batch = family.complete(model, batch)
    for stack in family.stacks(model):
        batch = _check_stack(model, family, stack, batch)


def _check_stack(model: nn.Module, family: Family, stack: Stack, batch: Batch) -> Batch:
    """Checks a stack; the batch with what its readout hands to the next."""
    values: list[int] = []
    stream = enter(model, family, stack, [batch], ActivationStore(math.inf), values)[0]
    first = stream.load()
    if not is_finite(first):
        return batch  # which the walk refuses by name
    given, options = stream.calls[0]
    kinds = [_kind(block, call) for block, call in zip(stack.blocks, stream.calls, strict=True)]
    last = max(map(kinds.index, kinds))
    for index, block in enumerate(stack.blocks[: last + 1]):
        if kinds.index(kinds[index]) == index:
            _Check(block, stream, stack, family.repeated).run()
        stream.finish(block.module)
    stream.calls = []
    _Check(stack.readout, stream, stack).run()
    if not values:  # of a single block `enter` does not need them
        output = stack.blocks[0].module(first, *given, **options)
        values = [len(output) if isinstance(output, tuple) else 0]
    return _check_around(model, family, stack, batch, first, values[0])


def _kind(block: Section, call: Any) -> tuple[Any, ...]:
    """What tells kinds of blocks apart: steps, tensors, settings of their modules, and the arguments they get."""
    settings = [
        (name, type(module).__name__, key, value)
        for name, module in block.module.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and not any(part in key for part in INDEX)
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.module.state_dict().items()]
    given = [
        (key, type(value).__name__, tuple(value.shape) if isinstance(value, Tensor) else None)
        for key, value in [*enumerate(call[0]), *call[1].items()]
    ]
    return (block.steps, tuple(settings), tuple(shapes), tuple(map(str, given)))


class _Check:
    """The check of one section, block or readout, with the stream that has reached it; `repeated`: see Family."""

    def __init__(self, section: Section, stream: HiddenState, stack: Stack, repeated: tuple[str, ...] = ()) -> None:
        self.section, self.stream, self.stack, self.repeated = section, stream, stack, repeated
        self.is_block = section is not stack.readout
        self.hidden = stream.hidden
        self.plain = self._pass(self.hidden)

    def run(self) -> None:
        """_FoundError where the section is not what its steps say."""
        if not self.section.steps or not is_finite(self.plain.given):
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
        """One pass through the section from this input, in which modules give something else where it is said."""
        fresh = replace(self.stream, hidden=hidden, forward_pass=None, handle=None)
        with traced(self.section, change) as trace:
            fresh.finish(self.section.module)
        trace.given = fresh.hidden
        return trace

    def _check_order(self) -> None:
        """That every module is called once, in the order of the steps."""
        calls, wanted = self.plain.calls, self.section.modules
        for name in wanted:
            if name not in calls:
                raise _FoundError(f"{self._name(name)} is never called")
            if calls.count(name) > 1 and name not in self.repeated:
                raise _FoundError(f"{self._name(name)} is called {calls.count(name)} times, not once")
        number = {name: index for index, step in enumerate(self.section.steps) for name in _names(step)}
        met = list(dict.fromkeys(calls))
        for before, after in pairwise(met):
            if number[after] < number[before]:
                raise _FoundError(f"{self._name(after)} is called after {self._name(before)}, not before it")

    def _check_linears(self, step: Linears, number: int) -> None:
        """That linears read one tensor, of the tokens that are assumed, and that their outputs go where it is said."""
        read, first = self.plain.inputs, step.names[0]
        for name in step.names:
            module, given = self.section.module.get_submodule(name), self.plain.outputs[name]
            if not torch.equal(read[name], read[first]):
                raise _FoundError(f"{self._name(name)} reads another tensor than {self._name(first)}")
            bias = getattr(module, "bias", None)
            weight = module.get_parameter("weight")
            if weight.shape != (given.shape[-1], read[name].shape[-1]):
                raise _FoundError(f"the weight of {self._name(name)} is not (outputs, inputs)")
            self._compare(given, linear(read[name], weight, bias), f"{self._name(name)} does not give W x + b")
        tokens = read[first].shape[:-1]
        mask = self.stream.memory if step.memory else self.stream.mask
        wanted = mask.shape if mask is not None else tokens if step.memory else self.hidden.shape[:-1]
        if self.is_block and tokens != wanted:
            raise _FoundError(f"{self._name(first)} reads (samples, tokens) {list(tokens)}, not {list(wanted)}")
        self._check_added(step, number)

    def _check_added(self, step: Linears, number: int) -> None:
        """That the output is added to the stream, or is what the norm behind it reads."""
        rest, name = self.section.steps[number + 1 :], step.names[0]
        behind = self.plain.inputs[_names(rest[0])[0]] if rest else self.plain.given
        if step.stream is not None:
            wanted = self.plain.inputs[step.stream] + step.scale * self.plain.outputs[name]
            said = f"{self._name(name)} is not added to what {self._name(step.stream)} reads"
            self._compare(behind, wanted, said, self.plain.inputs[step.stream])
        elif len(step.names) == 1 and rest and isinstance(rest[0], Norm):
            said = f"{self._name(rest[0].name)} does not read what {self._name(name)} gives"
            self._compare(behind, self.plain.outputs[name], said)

    def _check_norm(self, step: Norm) -> None:
        """That the norm gives a gain, and a bias, times what it makes of its input without them."""
        norm = self.section.module.get_submodule(step.name)
        if not has_gain(norm):
            return
        read, given = (
            tensor.flatten(0, -2) for tensor in (self.plain.inputs[step.name], self.plain.outputs[step.name])
        )
        scaled = normalised(norm, read) * (norm.get_parameter("weight") + unit(norm))
        bias = getattr(norm, "bias", None)
        said = f"{self._name(step.name)} does not give a gain times its normalized input"
        self._compare(given, scaled if bias is None else scaled + bias, said, scaled)

    def _check_fixed_point(self) -> None:
        """That a section whose steps meet their targets gives what the expert's gives, whatever its input."""
        drift = DRIFT * self.hidden.roll(1, -1)
        found = self._pass(self.hidden + drift, self._target)
        streams = [step.stream for step in self.section.steps if isinstance(step, Linears) and step.stream]
        said = f"{self._name('')} has a path from its input to its output that is not in its steps"
        if not self.is_block:
            self._compare(found.given, self.plain.given, said)
            return
        terms = self.hidden.abs() + drift.abs()
        for name in streams:
            terms = terms + self.plain.inputs[name].abs()
        # what is normed before it is added makes up for no drift
        self._compare(found.given, self.plain.given + (0 if streams else drift), said, terms)

    def _target(self, name: str, given: Tensor, trace: Trace) -> Tensor:
        """What calibration would have this module give, with the plain pass for the expert's."""
        step = next(step for step in self.section.steps if name in _names(step))
        target = self.plain.outputs[name]
        if isinstance(step, Linears) and step.stream is not None:
            target = target + (self.plain.inputs[step.stream] - trace.inputs[step.stream]) / step.scale
        return target

    def _check_mixing(self, step: Linears | Norm, token: int) -> None:
        """That what is not said to reach the other tokens does not: the token that is read out depends on its own
        outputs alone."""
        mixing = step.mixing if isinstance(step, Linears) else (step.name,) if step.mixing else ()
        alone = [name for name in _names(step) if name not in mixing]

        def change(name: str, given: Tensor, trace: Trace) -> Tensor:
            if name not in alone or given.ndim < 3:
                return given
            other = 1 - given
            other[:, token] = given[:, token]
            return other

        if alone:
            found = self._pass(self.hidden, change)
            said = f"what {self._name(alone[0])} gives for a token reaches other tokens"
            self._compare(found.given[:, token], self.plain.given[:, token], said)

    def _compare(self, found: Tensor, wanted: Tensor, said: str, terms: Tensor | None = None) -> None:
        """_FoundError where two tensors differ by more than rounding; `terms`: of what their difference may be."""
        if found.shape != wanted.shape or not _close(found, wanted, terms):
            raise _FoundError(said)

    def _name(self, local: str) -> str:
        return self.section.name(local).rstrip(".")


def _close(found: Tensor, wanted: Tensor, terms: Tensor | None = None) -> bool:
    """Whether two tensors are equal but for the rounding of numbers as large as theirs and `terms`."""
    size = wanted.abs() if terms is None else wanted.abs() + terms.abs()
    allowed = RELATIVE * size + ABSOLUTE * size.square().mean().sqrt()
    return bool(((found - wanted).abs() <= allowed).all())


def _names(step: Linears | Norm) -> tuple[str, ...]:
    return step.names if isinstance(step, Linears) else (step.name,)


def _check_around(model: nn.Module, family: Family, stack: Stack, batch: Batch, hidden: Tensor, values: int) -> Batch:
    """Checks what the model does in front of its blocks, between and behind them, these with blocks that give back
    their input; the batch with what the readout hands on."""
    for part in stack.stem:
        if isinstance(part, Table):
            calls([model.get_submodule(part.reader or part.name)], lambda: family.features(model, batch))
    own = stack.readout.module(hidden)
    with bypassed(stack.blocks, values) as met:
        features = family.features(model, batch)
    for index, tensor in enumerate(met):
        if not torch.equal(tensor, hidden):
            raise _FoundError(f"the model changes what {stack.blocks[index].prefix} reads of the blocks before it")
    if stack.handed is not None:
        batch = {**batch, stack.handed: own}
        rows = family.features(model, batch)
    else:
        mask = stack.mask(batch)
        rows = pooled(own, MEAN, mask) if stack.read_token == MEAN else real_tokens(own, mask if own.ndim > 2 else None)
    if rows.shape != features.shape or not _close(features, rows):
        raise _FoundError(f"the model does not read its last block through {', '.join(_readout_names(stack))} alone")
    return batch


def _readout_names(stack: Stack) -> list[str]:
    return [stack.readout.name(name) for name in stack.readout.modules] or ["its first token"]
