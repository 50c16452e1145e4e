"""Oracle: the same sums over whole task vectors in torch."""

from __future__ import annotations

from pathlib import Path

import torch

from epmq_cli.inspection.task_vectors import task_vector_content
from tests.helpers.merging import source, tensors

SHAPES = {"layers.0.weight": (40, 30), "layers.1.weight": (40, 30), "table": (50, 20)}


def test_norms_cosines_conflicts_and_shares_are_those_of_whole_vectors(tmp_path: Path) -> None:
    base, one, two = (tensors(seed, SHAPES) for seed in range(3))
    content, problems = task_vector_content(source(tmp_path, base, {"one": one, "two": two}), 0.3)
    a, b = (torch.cat([(own[name] - base[name]).flatten() for name in SHAPES]) for own in (one, two))
    assert content is not None and problems == []
    total = content["total"]
    assert abs(total["norms"]["one"] - float(a.norm())) < 1e-3
    assert abs(total["cosines"]["one"]["two"] - float(torch.cosine_similarity(a, b, 0))) < 1e-5
    assert abs(total["sign_conflicts"] - float((a * b < 0).float().mean())) < 1e-6
    assert abs(total["trimmed"]["two"] - 0.7) < 1e-3
    kept = [torch.where(v.abs() >= content["thresholds"][n], v, 0) for n, v in (("one", a), ("two", b))]
    outvoted = ((kept[0] * sum(kept)) < 0).float().mean()
    assert abs(total["outvoted"]["one"] - float(outvoted)) < 1e-6
    assert [block["block"] for block in content["blocks"]] == ["layers.0", "layers.1", "outside"]
    assert sum(block["elements"] for block in content["blocks"]) == len(a)
    table = next(row for row in content["tensors"] if row["tensor"] == "table")
    vectors = [own["table"] - base["table"] for own in (one, two)]
    assert table["shape"] == [50, 20]
    assert abs(table["norm"] - float(sum(vector.norm() for vector in vectors)) / 2) < 1e-3
    assert abs(table["cosine"] - float(torch.cosine_similarity(*(vector.flatten() for vector in vectors), 0))) < 1e-5


def test_equal_experts_have_no_conflicts_and_a_cosine_of_1(tmp_path: Path) -> None:
    base, one = tensors(0, SHAPES), tensors(1, SHAPES)
    content, _ = task_vector_content(source(tmp_path, base, {"one": one, "two": one}), 1.0)
    assert content is not None
    assert content["total"]["sign_conflicts"] == 0
    assert abs(content["total"]["cosines"]["one"]["two"] - 1) < 1e-9
    assert content["total"]["trimmed"] == {"one": 0, "two": 0}


def test_elements_that_an_expert_leaves_are_not_trimmed(tmp_path: Path) -> None:
    """As those of a LoRA adapter, which changes few tensors: TIES keeps all that it changes."""
    base, one = tensors(0, SHAPES), tensors(1, SHAPES)
    one = {**base, "table": one["table"]}
    content, _ = task_vector_content(source(tmp_path, base, {"one": one}), 0.5)
    assert content is not None
    assert content["total"]["trimmed"] == {"one": 0}
    assert [block["trimmed"]["one"] for block in content["blocks"]] == [0, 0, 0]


def test_nan_is_refused_in_the_words_of_a_run(tmp_path: Path) -> None:
    base, one = tensors(0, SHAPES), tensors(1, SHAPES)
    one["table"][0, 0] = float("nan")
    content, problems = task_vector_content(source(tmp_path, base, {"one": one}), 0.2)
    assert content is None
    assert problems == ["one: table holds a NaN or an infinity; train or fetch the model again"]
