"""Oracle: the model's own tensors, before and after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epmq_cli.models.weights import copy_into, swapped_weights


def test_copied_values_use_the_models_own_storage() -> None:
    model = nn.Linear(2, 2)
    address = model.weight.data_ptr()
    copy_into(model, {"weight": torch.full((2, 2), 3.0)})
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
    assert model.weight.data_ptr() == address


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_values_are_restored_even_after_an_error(fails: bool) -> None:
    model = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with swapped_weights(model, {"weight": before["weight"] + 1}):
            assert torch.equal(model.weight, before["weight"] + 1)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
