"""Oracles: TALL masks by hand; with no consensus required the merge is Task Arithmetic or TIES."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.merge.consensus import consensus
from tests.helpers.merging import merged, method, tensors

BASE, EXPERTS = tensors(0), [tensors(1), tensors(2), tensors(3)]


@pytest.mark.parametrize(("k", "wanted"), [(0, [3.0, 1.0, 2.5]), (1, [3.0, 1.0, 0.0]), (2, [3.0, 0.0, 0.0])])
def test_elements_that_matter_for_fewer_tasks_are_dropped(k: int, wanted: list[float]) -> None:
    """At factor 1, the first element matters for both tasks (2 > 1, 1.6 > 1.4), the second for one (1 > 0), and the
    third for none (1 < 1.5, 0.5 < 2)."""
    vectors = {"a": torch.tensor([2.0, 1.0, 1.0]), "b": torch.tensor([1.6, 0.1, 0.5])}
    found = consensus(torch.tensor([3.0, 1.0, 2.5]), vectors, {"a": 1.0, "b": 1.0}, k)
    assert found.tolist() == wanted


@pytest.mark.parametrize(("name", "plain"), [("consensus_ta", "task_arithmetic"), ("consensus_ties", "ties")])
def test_without_a_required_consensus_the_merge_is_the_plain_one(name: str, plain: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name, k=0), BASE, EXPERTS)
    torch.testing.assert_close(found, merged(tmp_path / "y", method(plain), BASE, EXPERTS))


@pytest.mark.parametrize("name", ["consensus_ta", "consensus_ties"])
def test_it_is_the_papers_formula(name: str, tmp_path: Path) -> None:
    plain = {"consensus_ta": method("task_arithmetic", scale=1), "consensus_ties": method("ties", scale=1)}[name]
    whole = merged(tmp_path / "y", plain, BASE, EXPERTS)
    factors = {"t0": 0.2, "t1": 0.4, "t2": 0.6}
    found = merged(tmp_path / "x", method(name, tall_mask_lambda=factors, k=2, scale=0.5), BASE, EXPERTS)
    for part in BASE:
        masks = [
            (expert[part] - BASE[part]).abs() > factor * (whole[part] - expert[part]).abs()
            for expert, factor in zip(EXPERTS, factors.values(), strict=True)
        ]
        kept = torch.stack(masks).sum(0) >= 2
        torch.testing.assert_close(found[part], BASE[part] + 0.5 * kept * (whole[part] - BASE[part]))


def test_one_expert_agrees_with_itself(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("consensus_ta", scale=1), BASE, EXPERTS[:1])
    torch.testing.assert_close(found, EXPERTS[0])
