"""Where parameters are; tests/end_to_end/test_gpu.py compares checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from epmq_cli.runtime import block_offload
from epmq_cli.runtime.block_offload import offload_blocks, on_device
from tests.helpers.gpu import DEVICE

pytestmark = pytest.mark.gpu

GPU = torch.device(DEVICE, 0)


class Model(nn.Module):
    """Two blocks between other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks, self.head = nn.Embedding(3, 4), nn.ModuleList(), nn.Linear(4, 2)
        self.blocks.extend(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> Any:
        """All layers in turn."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def places(module: nn.Module) -> set[str]:
    """The devices of a module's parameters."""
    return {parameter.device.type for parameter in module.parameters()}


def test_a_block_is_on_the_device_only_while_it_runs() -> None:
    model, seen = Model(), list[tuple[set[str], set[str]]]()
    blocks = list(model.blocks)
    offload_blocks(model, blocks, GPU)
    assert [places(module) for module in (model.table, *blocks, model.head)] == [{"cuda"}, {"cpu"}, {"cpu"}, {"cuda"}]
    for block in blocks:
        block[1].register_forward_hook(lambda *_: seen.append((places(blocks[0]), places(blocks[1]))))
    assert model(torch.zeros(5, dtype=torch.long, device=GPU)).shape == (5, 2)
    assert seen == [({"cuda"}, {"cpu"}), ({"cpu"}, {"cuda"})]
    assert places(blocks[0]) == places(blocks[1]) == {"cpu"}


def test_a_copy_that_is_made_on_the_device_stays_there() -> None:
    model = Model()
    offload_blocks(model, list(model.blocks), GPU)
    own = model.blocks[0][0].weight.data
    with on_device(model.head), torch.inference_mode(), on_device(model.blocks[1]):  # the head is there already
        teacher = copy.deepcopy(model.blocks[1])
        assert teacher(torch.zeros(1, 4, device=GPU)).device == GPU
    assert (places(teacher), places(model.blocks[1])) == ({"cuda"}, {"cpu"})
    assert model.blocks[0][0].weight.data.data_ptr() == own.data_ptr()


def test_a_large_table_is_looked_up_on_the_host_and_a_large_linear_moves_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_offload, "LARGE", 0)
    model, ids = Model(), torch.tensor([0, 2, 1])
    wanted, seen = model(ids), list[set[str]]()
    offload_blocks(model, list(model.blocks), GPU, [model.table, model.head])
    assert places(model) == {"cpu"}
    model.head.register_forward_pre_hook(lambda *_: seen.append(places(model.table) | places(model.head)))
    found = model(ids.to(GPU))
    assert found.device == GPU
    torch.testing.assert_close(found.cpu(), wanted)
    assert seen == [{"cpu", "cuda"}]
    with pytest.raises(RuntimeError):
        model.head(torch.zeros(1, 3, device=GPU))  # too narrow
    assert places(model) == {"cpu"}
    assert type(model.head) is nn.Linear


def test_small_weights_outside_of_blocks_are_on_the_device() -> None:
    model = Model()
    offload_blocks(model, list(model.blocks), GPU, [model.table, model.head])
    assert (places(model.table), places(model.head)) == ({"cuda"}, {"cuda"})
