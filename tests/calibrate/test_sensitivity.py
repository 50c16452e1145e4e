"""Oracle: a divergence that is the squared change of all weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from epmq_cli.calibrate.sensitivity import divergences
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import ints


def test_one_group_after_the_other_is_rounded_and_the_model_stays_as_it_is() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 4) for name in "qko"})
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student: Any = SimpleNamespace(
        model=model, dtype=torch.float32, own=lambda name: model.get_parameter(name).detach().clone()
    )

    def changed() -> float:
        return sum(float((tensor - start[name]).square().sum()) for name, tensor in model.state_dict().items())

    errors = {
        name: float((rtn(start[f"{name}.weight"], ints(2, 4), "mse", torch.float32).dequantize() - x).square().sum())
        for name, x in ((name, start[f"{name}.weight"]) for name in "qko")
    }
    found = divergences(student, {"q": "q", "k": "q", "o": "o"}, ints(2, 4), lambda: changed)
    assert found == pytest.approx({"q": errors["q"] + errors["k"], "o": errors["o"]}, rel=1e-6)
    assert changed() == 0
