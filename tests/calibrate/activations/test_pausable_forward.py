"""Oracles: the model's own forward pass, and call counters in its modules."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.pausable_forward import PausableForward, pause_hooks

NAMES = ("first", "second", "third")


class Chain(nn.Module):
    """x -> third(second(first(x)) + first(x)), each module adding its number."""

    class Add(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.called = number, 0

        def forward(self, x: Tensor) -> Tensor:
            self.called += 1
            return x + self.number

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (Chain.Add(number) for number in (1, 10, 100))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.first(x)
        found: Tensor = self.third(self.second(residual) + residual)
        return found


def called(model: Chain) -> list[int]:
    return [model.first.called, model.second.called, model.third.called]


def test_a_pass_pauses_before_modules_and_runs_each_once() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(lambda: model(torch.zeros(2)))
        assert forward_pass.run_until(["second"]).tolist() == [1, 1]
        assert called(model) == [1, 0, 0]
        assert forward_pass.run_until(["second", "third"]).tolist() == [1, 1], "it is there already"
        assert forward_pass.run_until(["third"]).tolist() == [12, 12]
        assert forward_pass.finish().tolist() == [112, 112]
    assert called(model) == [1, 1, 1]


def test_a_paused_pass_continues_with_changed_modules() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        passes = [PausableForward(lambda start=start: model(torch.full((1,), start))) for start in (0.0, 1000.0)]  # type: ignore[misc]
        assert [float(forward_pass.run_until(["third"])) for forward_pass in passes] == [12, 2012]
        model.third.number = 500
        assert [float(forward_pass.finish()) for forward_pass in passes] == [512, 2512]


def test_captured_inputs_are_kept_until_the_pass_finishes() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(lambda: model(torch.zeros(1)))
        forward_pass.capture = {"first"}
        forward_pass.run_until(["third"])
        assert forward_pass.captured["first"].tolist() == [0]
        assert {float(tensor) for tensor in forward_pass.held_tensors()} == {0, 1, 12}
        forward_pass.finish()
        assert forward_pass.captured == {}


def test_passes_without_pauses_run_through() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        assert model(torch.zeros(1)).tolist() == [112]
    assert PausableForward(lambda: model(torch.zeros(1))).finish().tolist() == [112]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_first_call_of_a_module_counts() -> None:
    model = Chain()

    def twice() -> Tensor:
        model.first(torch.full((1,), 7.0))
        found: Tensor = model(torch.zeros(1))
        return found

    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(twice)
        forward_pass.capture = {"first"}
        assert forward_pass.run_until(["second"]).tolist() == [1]
        assert forward_pass.captured["first"].tolist() == [7]


def test_a_module_that_is_never_called_is_an_error() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(lambda: model.first(torch.zeros(1)))
        with pytest.raises(RuntimeError, match="the forward pass never called second or third"):
            forward_pass.run_until(["second", "third"])


def test_an_error_in_the_model_is_raised() -> None:
    model = Chain()
    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(lambda: model(None))
        with pytest.raises(TypeError):
            forward_pass.run_until(["second"])


def test_an_abandoned_pass_is_cleaned_up() -> None:
    model, left = Chain(), []

    def forward() -> Tensor:
        try:
            found: Tensor = model(torch.zeros(1))
            return found
        finally:
            left.append(True)

    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(forward)
        forward_pass.run_until(["second"])
        del forward_pass
        gc.collect()
    assert left == [True]


def test_held_tensors_are_those_of_the_paused_calls_except_parameters() -> None:
    model = Chain()
    weight, given, refs = nn.Parameter(torch.tensor(5.0), requires_grad=False), {"inside": (torch.tensor(6.0),)}, []

    def forward() -> Tensor:
        local, own = torch.tensor(7.0), weight
        refs.append(weakref.ref(local))
        model.first(own * 2)
        del local
        found: Tensor = model.second(given["inside"][0])
        return found

    with pause_hooks(model, NAMES):
        forward_pass = PausableForward(forward)
        forward_pass.run_until(["first"])
        assert {float(tensor) for tensor in forward_pass.held_tensors()} == {6, 7, 10}
        forward_pass.run_until(["second"])
        gc.collect()
        assert refs[0]() is None
        assert {float(tensor) for tensor in forward_pass.held_tensors()} == {6}
        assert float(forward_pass.finish()) == 16


def test_a_module_that_is_never_called_is_named() -> None:
    model = Chain()
    with pause_hooks(model, NAMES), pytest.raises(RuntimeError, match="the forward pass never called fourth or fifth"):
        PausableForward(lambda: model(torch.zeros(2))).run_until(["fourth", "fifth"])
