"""Oracles: the least squares solution over the inputs of all experts; equal moments give the mean; with a fallback, the
errors on the inputs held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError, DataError, ModelError
from epmq_cli.merge.regmean import JudgedRegression, RegMean, Regression, parts
from tests.helpers.merging import LINEARS, SHAPES, GivenData, merged, method, source, tensors

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
    found = merged(tmp_path / "x", RegMean(1, False), tensors(0), EXPERTS, given)
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
    found = merged(tmp_path / "x", RegMean(0.3, False), tensors(0), EXPERTS, given)["a.weight"]
    left, right = torch.zeros(6, 6), torch.zeros(6, 4)
    for (_, G), expert in zip(own.items(), EXPERTS, strict=True):
        shrunk = G * (0.3 + 0.7 * torch.eye(6))
        left, right = left + shrunk, right + shrunk @ expert["a.weight"].double().T
    torch.testing.assert_close(found.double(), (torch.linalg.inv(left) @ right).T, rtol=1e-5, atol=1e-5)


def test_equal_moments_give_the_mean(tmp_path: Path) -> None:
    for number, G in enumerate((torch.eye(6, dtype=torch.float64), moments(inputs(1, 20, "a")))):
        given = GivenData(moments={f"t{i}": {"a": G} for i in range(3)})
        found = merged(tmp_path / str(number), RegMean(0.9, False), tensors(0), EXPERTS, given)
        torch.testing.assert_close(found["a.weight"], mean("a.weight"))


def test_unused_columns_keep_the_mean(tmp_path: Path) -> None:
    unused = {f"t{i}": {"a": moments(inputs(i, 20, "a") * torch.tensor([1, 1, 0, 1, 0, 1]))} for i in range(3)}
    found = merged(tmp_path / "x", RegMean(0.95, False), tensors(0), EXPERTS, GivenData(moments=unused))["a.weight"]
    torch.testing.assert_close(found[:, [2, 4]], mean("a.weight")[:, [2, 4]], rtol=1e-4, atol=1e-4)
    nothing = GivenData(moments={f"t{i}": {"a": torch.zeros(6, 6, dtype=torch.float64)} for i in range(3)})
    found = merged(tmp_path / "y", RegMean(0.95, False), tensors(0), EXPERTS, nothing)["a.weight"]
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


def held(X: Tensor) -> Tensor:
    return torch.arange(len(X)) % 5 == 4


def with_fallback(X: list[Tensor], W: list[list[Tensor]]) -> tuple[list[Tensor], list[bool]]:
    """The merged weights of linears that read the same inputs, and whether they are the mean, from the definitions.
    `X`: the inputs (tokens, in) by task. `W`: the weights by linear and task."""
    merged, kept = [], []
    for own in W:

        def solved(rows: list[Tensor], own: list[Tensor] = own) -> Tensor:
            grams = [x.T @ x * (0.9 + 0.1 * torch.eye(x.shape[1])) for x in rows]
            right = torch.stack([G @ w.T for G, w in zip(grams, own, strict=True)]).sum(0)
            return torch.linalg.solve(torch.stack(grams).sum(0), right).T

        def error(merge: Tensor, own: list[Tensor] = own) -> float:
            tests = [(x[held(x)], w) for x, w in zip(X, own, strict=True)]
            sizes = [sum(float((x[held(x)] @ linear[i].T).square().sum()) for linear in W) for i, x in enumerate(X)]
            return sum(float((x @ (merge - w).T).square().sum()) / n for (x, w), n in zip(tests, sizes, strict=True))

        average = torch.stack(own).mean(0)
        kept.append(error(solved([x[~held(x)] for x in X])) > error(average))
        merged.append(average if kept[-1] else solved(X))
    return merged, kept


def test_the_fallback_is_the_better_one_on_the_samples_held_out() -> None:
    found_kept = []
    for seed in range(8):
        names = {f"{kind}{i}": (rows, 6) for i in range(3) for kind, rows in (("X", 20), ("p", 4), ("q", 3))}
        drawn = {name: tensor.double() for name, tensor in tensors(seed, names).items()}
        scales = torch.tensor([[3.0, 1, 1, 1, 1, 1], [1, 1, 1, 3, 1, 1], [1, 1, 1, 1, 1, 2]])
        X = [drawn[f"X{i}"] * scales[i] for i in range(3)]
        W = [[drawn[f"{kind}{i}"] for i in range(3)] for kind in "pq"]
        mean = {kind: torch.stack(own).mean(0) for kind, own in zip("pq", W, strict=True)}
        judged = JudgedRegression(*(Regression(torch.zeros(6, 6).double(), mean) for _ in range(3)))
        for i in range(3):
            own, test = X[i][~held(X[i])], X[i][held(X[i])]
            judged.add(own.T @ own / 20, test.T @ test / 20, {"p": W[0][i], "q": W[1][i]}, 0.9)
        found, kept = judged.solve()
        wanted, wanted_kept = with_fallback(X, W)
        torch.testing.assert_close([found["p"], found["q"]], wanted)
        assert [name in kept for name in "pq"] == wanted_kept
        found_kept += wanted_kept
    assert 2 < sum(found_kept) < len(found_kept) - 2


def overfitted_and_not() -> GivenData:
    """Two experts. Inputs of `a`: few, alike for both experts, so that the mean is best and least squares overfit.
    Inputs of `b`: many, in other columns for each expert, where least squares are exact."""
    own = [{"a": tensors(i, {"a": (5, 6)})["a"], "b": tensors(i, {"b": (40, 4)})["b"]} for i in range(2)]
    own[0]["b"][:, 2:] *= 0.01
    own[1]["b"][:, :2] *= 0.01
    return GivenData(inputs={f"t{i}": inputs for i, inputs in enumerate(own)})


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_linears_that_overfit_keep_the_mean(name: str, memory: int, tmp_path: Path) -> None:
    data = replace(overfitted_and_not(), memory=memory)
    found, plain = (
        merged(tmp_path / str(on), method(name, alpha=1, fallback=on), tensors(0), EXPERTS[:2], data)
        for on in (True, False)
    )
    average = torch.stack([expert["a.weight"] for expert in EXPERTS[:2]]).mean(0)
    torch.testing.assert_close(found["a.weight"], average)
    assert float((plain["a.weight"] - average).abs().max()) > 0.3
    torch.testing.assert_close(found["b.weight"], plain["b.weight"], rtol=1e-4, atol=1e-5)
    columns = torch.cat([expert["b.weight"][:, 2 * i : 2 * i + 2] for i, expert in enumerate(EXPERTS[:2])], 1)
    torch.testing.assert_close(found["b.weight"], columns, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
def test_the_message_counts_linears_that_keep_the_mean(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "epmq")
    merged(tmp_path / "x", method(name, alpha=1, fallback=True), tensors(0), EXPERTS[:2], overfitted_and_not())
    assert "merge.fallback: 1 of 2 linears keep the mean of the experts" in caplog.text
    caplog.clear()
    merged(tmp_path / "y", method(name, alpha=1, fallback=True), tensors(0), EXPERTS[:1], overfitted_and_not())
    assert "merge.fallback" not in caplog.text


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
def test_the_fallback_changes_no_expert_and_no_unused_input(name: str, tmp_path: Path) -> None:
    one = merged(tmp_path / "one", method(name, fallback=True), tensors(0), EXPERTS[:1])
    assert all(torch.equal(one[part], EXPERTS[0][part]) for part in SHAPES)
    nothing = GivenData(inputs={f"t{i}": {"a": torch.zeros(10, 6)} for i in range(3)})
    found = merged(tmp_path / "none", method(name, fallback=True), tensors(0), EXPERTS, nothing)
    torch.testing.assert_close(found["a.weight"], mean("a.weight"))


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
def test_too_few_samples_are_refused_by_task(name: str, tmp_path: Path) -> None:
    few = GivenData(batches={f"t{i}": [{"x": torch.zeros(2, 6)}] * (i + 2) for i in range(2)})
    message = "task t0 has 4 calibration samples, but merge.fallback=true needs 5, because one in 5 is held out; raise"
    with pytest.raises(DataError, match=message):
        merged(tmp_path / "x", method(name, fallback=True), tensors(0), EXPERTS[:2], few)
    merged(tmp_path / "y", method(name, fallback=False), tensors(0), EXPERTS[:2], few)


def test_bad_options_are_refused() -> None:
    for alpha in (-0.1, 1.1, None, "x"):
        with pytest.raises(ConfigError, match=r"merge.alpha must be a number in \[0, 1\], got"):
            RegMean(alpha, False)  # type: ignore[arg-type]
