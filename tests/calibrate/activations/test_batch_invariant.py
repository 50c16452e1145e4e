"""Oracle: each row computed in one large batch, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from epmq_cli.calibrate.activations.batch_invariant import ROWS, batch_invariant
from epmq_cli.runtime import products

COUNTS = (1, 2, 3, 5, 11, 12, ROWS - 1, ROWS, ROWS + 1)


@pytest.mark.parametrize(("width", "out"), [(32, 64), (64, 32), (128, 384), (768, 96)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # "cuda" chooses torch's own library for products on the CPU
def test_a_row_does_not_depend_on_the_batch_size(
    width: int, out: int, bias: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_devices", {device})
    torch.manual_seed(0)
    linear, rows = nn.Linear(width, out, bias=bias), torch.randn(1000, width)
    with torch.inference_mode(), batch_invariant(linear):
        whole = linear(rows)
        for count in COUNTS:
            assert torch.equal(linear(rows[:count]), whole[:count])
            assert torch.equal(linear(rows[: 3 * count].reshape(count, 3, width)).flatten(0, 1), whole[: 3 * count])
        assert torch.equal(linear(rows[0]), whole[0])


def test_modules_are_restored_afterwards_and_copies_work_on_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="inside"), batch_invariant(model):
        copied = copy.deepcopy(model)
        assert type(model[0]) is not nn.Linear
        assert isinstance(model[0], nn.Linear)
        raise ValueError("inside")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(copied(torch.ones(2, 4)), model(torch.ones(2, 4)))
