"""Oracles: equal Fisher information gives the mean; large Fisher information of one expert gives that expert; the
paper's equation 4 in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.fisher import Fisher, WeightedMean
from tests.helpers.merging import SHAPES, GivenData, merged, method, tensors

EXPERTS = [tensors(seed) for seed in (1, 2, 3)]


def squares(seed: int, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: factor * tensor.square() for name, tensor in tensors(seed).items()}


def fisher(**options: Any) -> Fisher:
    made = method("fisher", **options)
    assert isinstance(made, Fisher)
    return made


def test_it_is_the_weighted_mean_of_the_paper(tmp_path: Path) -> None:
    given = {f"t{i}": squares(7 + i, 10.0**i) for i in range(3)}
    for number, normalize in enumerate((True, False)):
        options = {"normalize": normalize, "floor": 1e-3, "weights": {"t2": 3.0}}
        found = merged(tmp_path / str(number), fisher(**options), tensors(0), EXPERTS, GivenData(given))
        for name in SHAPES:
            above, below = torch.zeros(()), torch.zeros(())
            for i, expert in enumerate(EXPERTS):
                norm = torch.cat([part.double().flatten() for part in given[f"t{i}"].values()]).norm()
                weight = (given[f"t{i}"][name].double() + 1e-3) * (3.0 if i == 2 else 1.0) / (norm if normalize else 1)
                above, below = above + weight * expert[name].double(), below + weight
            torch.testing.assert_close(found[name].double(), above / below, rtol=1e-5, atol=1e-5)


def test_equal_fisher_information_gives_the_mean(tmp_path: Path) -> None:
    given = {f"t{i}": squares(7) for i in range(3)}
    found = merged(tmp_path / "x", fisher(), tensors(0), EXPERTS, GivenData(given))
    wanted = merged(tmp_path / "y", method("average"), tensors(0), EXPERTS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_expert_with_much_larger_fisher_information_is_reproduced(tmp_path: Path) -> None:
    one = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    given = {
        "t0": {name: 1e-3 * part for name, part in one.items()},
        "t1": {name: 1e6 * part for name, part in one.items()},
    }
    given["t2"] = given["t0"]
    found = merged(tmp_path / "x", fisher(normalize=False), tensors(0), EXPERTS, GivenData(given))
    torch.testing.assert_close(found, EXPERTS[1], rtol=1e-6, atol=1e-6)


def test_tensors_without_gradients_are_averaged(tmp_path: Path) -> None:
    given = {f"t{i}": {"a.weight": squares(i)["a.weight"]} for i in range(3)}
    found = merged(tmp_path / "x", fisher(normalize=False), tensors(0), EXPERTS, GivenData(given))
    wanted = torch.stack([expert["a.bias"] for expert in EXPERTS]).mean(0)
    torch.testing.assert_close(found["a.bias"], wanted)


def test_a_weight_of_0_excludes_an_expert(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", fisher(weights={"t0": 0}), tensors(0), EXPERTS)
    without = {f"t{i}": EXPERTS[i] for i in (1, 2)}
    torch.testing.assert_close(found, merged(tmp_path / "y", fisher(), tensors(0), without), rtol=1e-5, atol=1e-6)


def test_the_mean_of_equal_values_is_exact() -> None:
    mean, value = WeightedMean(), tensors(3)["a.weight"]
    for weight in (1e-9, 3.0, 0.1):
        mean.add(value, torch.full_like(value, weight))
    assert torch.equal(mean.mean, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 0}, r"merge.floor must be a number in \(0, 1\], got 0"),
        ({"classes": 0}, r"merge.classes must be a whole number in \[1, 1073741824\], got 0"),
        ({"weights": {"t0": -1}}, r"merge.weights.t0 must be a number in \[0, 100\], got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    good = {"floor": 1e-6, "normalize": True, "classes": None, "weights": None}
    with pytest.raises(ConfigError, match=message):
        Fisher(**{**good, **options})  # type: ignore[arg-type]
