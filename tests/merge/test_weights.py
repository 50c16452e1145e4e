"""Oracle: a weight of 2 equals the expert twice, and a weight of 0 equals the merge without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.average import Average
from epmq_cli.merge.task_arithmetic import TaskArithmetic
from tests.helpers.merging import METHODS, merged, method, tensors

WEIGHTED = [name for name in METHODS if hasattr(method(name), "weights")]
EXPERTS = {f"t{seed}": tensors(seed) for seed in (1, 2, 3)}


@pytest.mark.parametrize("name", ["average", "geometric_median", "linear", "multislerp", "task_arithmetic", "ties"])
def test_a_weight_of_2_equals_the_expert_twice(name: str, tmp_path: Path) -> None:
    options = {"max_iter": 10_000, "tol": 1e-12} if name == "geometric_median" else {}
    found = merged(tmp_path / "x", method(name, weights={"t2": 2}, **options), tensors(0), EXPERTS)
    wanted = merged(tmp_path / "y", method(name, **options), tensors(0), {**EXPERTS, "again": EXPERTS["t2"]})
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "nuslerp"])
def test_a_weight_of_0_excludes_the_expert(name: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name, weights={"t2": 0}), tensors(0), EXPERTS)
    wanted = merged(tmp_path / "y", method(name), tensors(0), {task: EXPERTS[task] for task in ("t1", "t3")})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTED)
def test_an_unknown_task_is_refused_with_a_suggestion(name: str) -> None:
    made = method(name, weights={"digist": 2.0})
    message = r"merge.weights has no option 'digist', the options are shapes, digits; did you mean digits\?"
    with pytest.raises(ConfigError, match=message):
        made.check(["shapes", "digits"])
    method(name, weights={"digits": 2.0}).check(["shapes", "digits"])


def test_weights_that_leave_no_expert_are_refused() -> None:
    with pytest.raises(ConfigError, match="merge.weights must leave at least one task above 0, got 0 for every task"):
        Average({"a": 0, "b": 0}).check(["a", "b"])


def test_weights_out_of_range_are_refused() -> None:
    TaskArithmetic(0.3, {"a": -1})  # unlearns the task
    with pytest.raises(ConfigError, match=r"merge.weights.a must be a number in \[0, 100\], got -1"):
        Average({"a": -1})
    with pytest.raises(ConfigError, match=r"merge.weights.a must be a number in \[-100, 100\], got nan"):
        TaskArithmetic(0.3, {"a": float("nan")})
