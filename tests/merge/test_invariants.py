"""Oracles: invariants that every merge method has, over all of them by glob, with as many experts as each takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.runtime import threads
from tests.helpers.merging import METHODS, SHAPES, merged, method, source, taken, tensors

DATA_FREE = [name for name in METHODS if not method(name).needs]
ORDERED = {"arcee_fusion", "nearswap", "slerp"}  # from a first end to a second one
GLOBAL = {"ties", "consensus_ties", "pcb", "localize_and_stitch"}  # thresholds depend on all tensors
EDGES = {
    "one": (1,),
    "row": (1, 5),
    "column": (5, 1),
    "number": (1, 1),
    "conv": (3, 2, 2, 1),
    "thin": (1, 1, 4),
    "scalar": (),
}
FULL: dict[str, Any] = {"density": 1, "scale": 1}
MEANS: dict[str, dict[str, Any]] = {
    "arcee_fusion": {},
    "average": {},
    "breadcrumbs_ties": {**FULL, "combine": "mean"},
    "dare_ties": {**FULL, "combine": "mean"},
    "della": {**FULL, "combine": "mean"},
    "fisher": {},
    "geometric_median": {},
    "karcher": {},
    "linear": {},
    "model_stock": {},
    "multislerp": {},
    "nearswap": {},
    "nuslerp": {},
    "passthrough": {},
    "ram": {},
    "regmean": {},
    "sce": {},
    "slerp": {},
    "ties": {**FULL, "combine": "mean"},
}
"""Methods, and options with which equal experts merge to these experts."""
SPARSE = ("breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "ties")


def experts(name: str, most: int = 3) -> dict[str, dict[str, Tensor]]:
    """As many random experts as the method takes."""
    return {f"t{seed}": tensors(seed) for seed in range(1, 1 + taken(name, most))}


@pytest.mark.parametrize("name", METHODS)
def test_experts_equal_to_the_base_give_the_base(name: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name), tensors(0), dict.fromkeys(experts(name), tensors(0)))
    torch.testing.assert_close(found, tensors(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ORDERED])
def test_order_of_experts_changes_nothing(name: str, tmp_path: Path) -> None:
    own = experts(name)
    first = merged(tmp_path / "x", method(name), tensors(0), own)
    second = merged(tmp_path / "y", method(name), tensors(0), dict(reversed(own.items())))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name in MEANS])
def test_equal_experts_give_this_expert(name: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name, **MEANS[name]), tensors(0), dict.fromkeys(experts(name), tensors(1)))
    torch.testing.assert_close(found, tensors(1), rtol=1e-5, atol=2e-5)  # RAM keeps changes below 1e-5 out


@pytest.mark.parametrize("name", [*(name for name in MEANS if name not in ORDERED), *SPARSE])
def test_one_expert_gives_this_expert(name: str, tmp_path: Path) -> None:
    options = MEANS.get(name, FULL)
    made = method(name, **options)
    if name in ("model_stock", "nuslerp"):
        with pytest.raises(ConfigError, match=rf"merge={name} merges .*2 experts and the suite has 1; change"):
            made.check(["t1"])
        return
    found = merged(tmp_path / "x", made, tensors(0), {"t1": tensors(1)})
    torch.testing.assert_close(found, tensors(1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["arcee_fusion", "nearswap", "nuslerp", "slerp"])
def test_too_many_experts_are_refused_before_a_model_is_opened(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"merge={name} merges .*2 experts and the suite has 3; change suite.tasks"):
        method(name).check(["t1", "t2", "t3"])
    method(name).check(["t1", "t2"])


@pytest.mark.parametrize("name", SPARSE)
def test_at_density_1_nothing_is_dropped(name: str, tmp_path: Path) -> None:
    plain = "ties" if hasattr(method(name), "combine") else "task_arithmetic"
    options = {"combine": "sum"} if plain == "ties" else {}
    found = merged(tmp_path / "x", method(name, **FULL, **options), tensors(0), experts(name))
    full = FULL if plain == "ties" else {"scale": 1}
    wanted = merged(tmp_path / "y", method(plain, **full, **options), tensors(0), experts(name))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_zero_task_vectors_and_dimensions_of_size_1_stay_finite(name: str, tmp_path: Path) -> None:
    shapes = SHAPES | EDGES
    own = {task: tensors(seed, shapes) for seed, task in enumerate(experts(name), 1)}
    for number, given in enumerate((own, {**own, "t1": tensors(0, shapes)})):
        found = merged(tmp_path / f"x{number}", method(name), tensors(0, shapes), given)
        assert {part: tensor.shape for part, tensor in found.items()} == {
            part: torch.Size(shape) for part, shape in shapes.items()
        }
        assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("name", METHODS)
def test_an_expert_with_a_nan_is_refused_by_name(name: str, tmp_path: Path) -> None:
    broken = experts(name)
    broken["t1"]["a.bias"][2] = float("nan")
    with pytest.raises(ModelError, match="t1: a.bias holds a NaN or an infinity; train or fetch the model again"):
        merged(tmp_path / "x", method(name), tensors(0), broken)


@pytest.mark.parametrize("name", DATA_FREE)
def test_threads_and_other_tensors_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"first": (300, 700), "second": (500, 400)}  # several pieces each
    base, models = tensors(0, shapes), [tensors(seed, shapes) for seed in (1, 2)][: taken(name)]
    opened, found = source(tmp_path / "all", base, models), {}
    for count in (1, 8):
        monkeypatch.setattr(threads, "threads", lambda count=count: count)
        found[count] = dict(LazyMerge(opened, method(name), torch.float32))
    assert all(torch.equal(found[1][part], found[8][part]) for part in shapes)
    if name in GLOBAL:
        return
    single = source(tmp_path / "one", {"second": base["second"]}, [{"second": other["second"]} for other in models])
    assert torch.equal(LazyMerge(single, method(name), torch.float32).tensor("second"), found[1]["second"])


@pytest.mark.parametrize("name", DATA_FREE)
def test_half_precision_models_merge_like_the_same_numbers_in_float32(name: str, tmp_path: Path) -> None:
    models = [{part: tensor.bfloat16() for part, tensor in tensors(seed).items()} for seed in range(1 + taken(name, 2))]
    wide = [{part: tensor.float() for part, tensor in model.items()} for model in models]
    found = merged(tmp_path / "x", method(name), models[0], models[1:])
    expected = merged(tmp_path / "y", method(name), wide[0], wide[1:])
    assert all(torch.equal(found[part], expected[part]) for part in SHAPES)
