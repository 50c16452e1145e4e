"""Oracle: the paper's three steps on whole tensors in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.merging import SHAPES, merged, method, tensors

BASE = tensors(0)
EXPERTS = [tensors(seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("select_topk", [1.0, 0.4])
def test_it_is_the_papers_formula(select_topk: float, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("sce", select_topk=select_topk), BASE, EXPERTS)
    for name in SHAPES:
        vectors = torch.stack([expert[name].double() - BASE[name].double() for expert in EXPERTS])
        variance = vectors.var(0, correction=0).flatten()
        selected = torch.zeros(len(variance)).double()
        selected[variance.argsort(descending=True)[: int(select_topk * len(variance))]] = 1
        vectors = vectors * selected.view(BASE[name].shape)
        weights = vectors.square().view(3, -1).mean(1)
        weights = weights / weights.sum() if weights.sum() > 0 else weights
        agrees = vectors.sign() == torch.where(vectors.sum(0) >= 0, 1, -1)
        factors = weights.view(-1, *[1] * BASE[name].ndim) * agrees
        wanted = BASE[name].double() + (factors * vectors).sum(0) / factors.sum(0).clamp(min=1e-30)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_short_task_vectors_merge_like_long_ones(tmp_path: Path) -> None:
    zero = {"w": torch.zeros(8)}
    experts = [{"w": factor * tensors(seed)["a.weight"].flatten()[:8]} for seed, factor in ((1, 1.0), (2, 3.0))]
    wanted = merged(tmp_path / "x", method("sce"), zero, experts)
    short = [{"w": expert["w"] * 2**-20} for expert in experts]
    found = merged(tmp_path / "y", method("sce"), zero, short)
    assert torch.equal(found["w"], wanted["w"] * 2**-20)


def test_one_expert_is_kept_whole(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("sce", select_topk=0.1), BASE, EXPERTS[:1])
    torch.testing.assert_close(found, EXPERTS[0])
