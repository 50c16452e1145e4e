"""Oracles: the least squares solution over the inputs of all experts; equal moments give the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.regmean import RegMean, Regression, parts
from tests.helpers.merging import LINEARS, SHAPES, GivenData, merged, source, tensors

EXPERTS = [tensors(seed) for seed in (1, 2, 3)]
WEIGHTS = ("a.weight", "b.weight")


def inputs(seed: int, tokens: int, name: str) -> Tensor:
    """(tokens, in) of a linear."""
    return tensors(seed, {name: (tokens, SHAPES[f"{name}.weight"][1])})[name].double()


def moments(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def mean(name: str) -> Tensor:
    return torch.stack([expert[name] for expert in EXPERTS]).mean(0)


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_linears_are_least_squares_on_each_experts_inputs_and_others_the_mean(memory: int, tmp_path: Path) -> None:
    X = {f"t{i}": {name: inputs(10 * i, 30, name) for (name,) in LINEARS} for i in range(3)}
    given = GivenData(
        moments={task: {name: moments(own) for name, own in parts.items()} for task, parts in X.items()}, memory=memory
    )
    found = merged(tmp_path / "x", RegMean(1), tensors(0), EXPERTS, given)
    for (name,) in LINEARS:
        rows = torch.cat([X[f"t{i}"][name] for i in range(3)])
        outputs = torch.cat([X[f"t{i}"][name] @ EXPERTS[i][f"{name}.weight"].double().T for i in range(3)])
        wanted = torch.linalg.lstsq(rows, outputs).solution.T
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    for name in SHAPES.keys() - {*WEIGHTS}:
        torch.testing.assert_close(found[name], mean(name))


def test_alpha_shrinks_the_off_diagonal_moments(tmp_path: Path) -> None:
    own = {f"t{i}": moments(inputs(i, 20, "a")) for i in range(3)}
    given = GivenData(moments={task: {"a": G} for task, G in own.items()})
    found = merged(tmp_path / "x", RegMean(0.3), tensors(0), EXPERTS, given)["a.weight"]
    left, right = torch.zeros(6, 6), torch.zeros(6, 4)
    for (_, G), expert in zip(own.items(), EXPERTS, strict=True):
        shrunk = G * (0.3 + 0.7 * torch.eye(6))
        left, right = left + shrunk, right + shrunk @ expert["a.weight"].double().T
    torch.testing.assert_close(found.double(), (torch.linalg.inv(left) @ right).T, rtol=1e-5, atol=1e-5)


def test_equal_moments_give_the_mean(tmp_path: Path) -> None:
    for number, G in enumerate((torch.eye(6, dtype=torch.float64), moments(inputs(1, 20, "a")))):
        given = GivenData(moments={f"t{i}": {"a": G} for i in range(3)})
        found = merged(tmp_path / str(number), RegMean(0.9), tensors(0), EXPERTS, given)
        torch.testing.assert_close(found["a.weight"], mean("a.weight"))


def test_unused_columns_keep_the_mean(tmp_path: Path) -> None:
    unused = {f"t{i}": {"a": moments(inputs(i, 20, "a") * torch.tensor([1, 1, 0, 1, 0, 1]))} for i in range(3)}
    found = merged(tmp_path / "x", RegMean(0.95), tensors(0), EXPERTS, GivenData(moments=unused))["a.weight"]
    torch.testing.assert_close(found[:, [2, 4]], mean("a.weight")[:, [2, 4]], rtol=1e-4, atol=1e-4)
    nothing = GivenData(moments={f"t{i}": {"a": torch.zeros(6, 6, dtype=torch.float64)} for i in range(3)})
    found = merged(tmp_path / "y", RegMean(0.95), tensors(0), EXPERTS, nothing)["a.weight"]
    torch.testing.assert_close(found, mean("a.weight"))


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    regression = Regression(torch.zeros(2, 2).double(), {"a": torch.zeros(3, 2).double()})
    regression.add(torch.full((2, 2), torch.nan).double(), {"a": torch.ones(3, 2).double()})
    with pytest.raises(ModelError, match="the inputs of a hold a NaN or an infinity; train or fetch the models again"):
        regression.solve()


def test_linears_are_measured_together_within_the_memory_limit(tmp_path: Path) -> None:
    opened = source(tmp_path, tensors(0), EXPERTS)
    assert list(parts(LINEARS, opened, 1)) == [[("a",)], [("b",)]]
    assert list(parts(LINEARS, opened, 1 << 30)) == [LINEARS]
    assert list(parts([], opened, 1)) == []


def test_bad_options_are_refused() -> None:
    for alpha in (-0.1, 1.1, None, "x"):
        with pytest.raises(ConfigError, match=r"merge.alpha must be a number in \[0, 1\], got"):
            RegMean(alpha)  # type: ignore[arg-type]
