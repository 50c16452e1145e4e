"""Oracles: transformers' own hidden states, and a chain of modules whose inputs are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.calibrate.activations.hidden_state import CarriedOutput, HiddenState, calls, enter, inputs
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config


class Chain(nn.Module):
    """Adds 1, 2 and 3 in turn."""

    class Add(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.called = number, 0

        def forward(self, x: Tensor, scale: float = 1) -> Tensor:
            self.called += 1
            return x + scale * self.number

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Chain.Add(number) for number in (1, 2, 3)])

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.parts[2](self.parts[1](self.parts[0](x), scale=10))
        return made


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_inputs_are_captured_in_the_requested_order() -> None:
    model = Chain()
    found = inputs([model.parts[2], model.parts[0]], lambda: model(torch.zeros(2)))
    assert [x.tolist() for x in found] == [[21, 21], [0, 0]]
    assert calls([model.parts[1]], lambda: model(torch.zeros(2)))[0][1] == {"scale": 10}
    assert hooks(model) == 0


def test_the_pass_stops_at_the_last_requested_module() -> None:
    model = Chain()
    inputs([model.parts[0], model.parts[1]], lambda: model(torch.zeros(2)))
    assert [part.called for part in model.parts] == [1, 0, 0]


def test_a_module_that_is_never_called_is_an_error_and_leaves_no_hook() -> None:
    model = Chain()
    with pytest.raises(RuntimeError, match="the forward pass never called Linear"):
        inputs([model.parts[0], nn.Linear(1, 1)], lambda: model(torch.zeros(2)))
    assert hooks(model) == 0


def test_an_error_inside_the_pass_leaves_no_hook() -> None:
    model = Chain()
    with pytest.raises(TypeError):
        inputs([model.parts[2]], lambda: model(None))
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_hidden_states_match_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    job = make_job(config(request.getfixturevalue(f"{name}_hub")))
    models, model, _ = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)["first"]
    stack = job.family.stacks(model)[0]
    with torch.inference_mode():
        streams = enter(model, job.family, stack, batches, ActivationStore(math.inf))
        assert len(streams) == len(batches)
        for stream, batch in zip(streams, batches, strict=True):
            tower = model.vision_model if name == "clip" else model
            hidden = tower(**batch, output_hidden_states=True).hidden_states  # type: ignore[operator]
            assert torch.equal(stream.hidden, hidden[0])
            for block, wanted in zip(stack.blocks, hidden[1:], strict=True):
                stream.finish(block.module)
                torch.testing.assert_close(stream.hidden, wanted)
            assert (stream.mask is None) == (name == "clip")
            if stream.mask is not None:
                assert torch.equal(stream.mask, batch["attention_mask"] == 1)


def test_the_first_output_of_a_block_that_returns_a_tuple_is_carried_on() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, str]:
            return x + scale * y, "attention"

    calls = [((torch.ones(2),), {"scale": 3.0}), ((CarriedOutput(1),), {})]
    stream = HiddenState(torch.ones(2), calls, None, ActivationStore(math.inf))
    stream.finish(Pair())
    assert stream.hidden.tolist() == [4, 4]
    received: list[object] = []
    stream.finish(Recorder(received))
    assert received == ["attention"]


class Recorder(nn.Module):
    """Records its arguments after the hidden state."""

    def __init__(self, received: list[object]) -> None:
        super().__init__()
        self.received = received

    def forward(self, x: Tensor, *others: object) -> Tensor:
        self.received.extend(others)
        return x
