"""Oracles: the mean and the sum by hand; the CPU's merge for that of an accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.matrices import TaskVectors, matrix_rule
from epmq_cli.merge.named_tensors import OnDevice
from tests.helpers.gpu import DEVICE
from tests.helpers.merging import method, source, tensors

SHAPES = {"w": (6, 4), "bias": (6,), "scalar": (), "conv": (2, 2, 2)}
BASE, EXPERTS = tensors(0, SHAPES), [tensors(1, SHAPES), tensors(2, SHAPES)]


def test_only_matrices_are_merged_by_the_function(tmp_path: Path) -> None:
    opened = source(tmp_path, BASE, EXPERTS)

    def zero(vectors: TaskVectors) -> Tensor:
        return torch.zeros_like(vectors.base)

    rule = matrix_rule(opened, "mean", 0.5, zero)
    for name in SHAPES:
        mean = (EXPERTS[0][name] + EXPERTS[1][name]) / 2 - BASE[name]
        wanted = BASE[name] + (0 if name == "w" else 0.5 * mean)
        torch.testing.assert_close(rule.merge(name, BASE[name], opened.experts(name)), wanted)


def test_task_vectors_are_read_on_access() -> None:
    experts = OnDevice({"a": EXPERTS[0]["w"], "b": EXPERTS[1]["w"]}, torch.device("meta"))
    assert list(experts) == ["a", "b"]
    assert experts["a"].device.type == "meta"
    vectors = TaskVectors(BASE["w"], experts.experts)
    assert list(vectors) == ["a", "b"]
    assert torch.equal(vectors["b"], EXPERTS[1]["w"] - BASE["w"])
    torch.testing.assert_close(vectors.total(), EXPERTS[0]["w"] + EXPERTS[1]["w"] - 2 * BASE["w"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "ace"])
def test_an_accelerator_gives_the_same_merge_up_to_rounding(name: str, tmp_path: Path) -> None:
    opened, merge = source(tmp_path, BASE, EXPERTS), method(name, post=["lines", "svc"])
    found = dict(LazyMerge(opened, merge, torch.float32, device=torch.device(DEVICE)))
    wanted = dict(LazyMerge(opened, merge, torch.float32))
    assert all(tensor.device.type == "cpu" for tensor in found.values())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
