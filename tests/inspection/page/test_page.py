"""Oracles: the rules of HTML; sections, shares and marks worked out by hand."""

from __future__ import annotations

import re
from typing import Any

from epmq_cli.inspection.page.models import parts
from epmq_cli.inspection.page.page import inspect_page
from tests.helpers.inspected import checkpoint, experts, model, task_vectors
from tests.helpers.markup import Ids

EVIL = "<script>alert(1)</script>"
TENSORS = {"layers.0.q.weight": (2, 4), "layers.1.q.weight": (2, 4), "layers.1.q.bias": (8,), "table.weight": (8, 1)}


def headings(text: str, level: int = 2) -> list[str]:
    """The headings of a page."""
    return re.findall(rf"<h{level}>(.*?)</h{level}>", text)


def of_experts(names: list[str], vectors: dict[str, Any] | None, *refused: str) -> str:
    """The page of experts."""
    return inspect_page({"models": [], "experts": experts(names, vectors, refused)})


def test_the_page_of_experts_has_maps_and_names_stay_text() -> None:
    names = [EVIL, "b"]
    text = of_experts(names, task_vectors(names, TENSORS))
    parsed = Ids(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert (parsed.loading, parsed.used - set(parsed.ids)) == ([], set())
    assert EVIL not in text and "&lt;script&gt;" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert headings(text) == [
        *("Cosines between task vectors", "Norms of task vectors", "Sign conflicts", "What TIES would drop"),
        *("Models", "Parameters by part"),
    ]
    assert text.count('role="img"') == 2 * 4
    described = dict(re.findall(r"<title id=\"(\w+)-wide-title\".*?<desc[^>]*>(.*?)</desc>", text))
    assert described == {
        "cosines": "From 0.50 to 0.50; the table below has all.",
        "norms": "From 1% to 4%; the largest is that of table.",
        "conflicts": "From 10% to 40%; the largest is that of table.",
        "dropped": "From 71% to 74%; the largest is that of table.",
    }  # of matrices alone: the third tensor is a vector
    assert "with merge.density=0.2, in %" in text
    assert '<th scope="row">layers.1.q.bias</th>' in text


def test_without_tensors_the_page_has_tables_and_refusals() -> None:
    text = of_experts(["a"], None, "a: holds a model of another kind")
    assert headings(text) == ["What a run would refuse", "Models", "Parameters by part"]
    assert "A: holds a model of another kind." in text
    assert "leaves 3 K as the base has them; it would refuse 1 thing." in text
    assert "<svg" not in text


def test_the_page_of_one_expert_has_no_cosines() -> None:
    text = of_experts(["a"], task_vectors(["a"], {"bias": (8,)}))
    assert headings(text) == ["Task vector", "Models", "Parameters by part"]
    assert "<svg" not in text


def test_shares_are_those_of_the_parameters() -> None:
    section = parts(model("m"))
    assert section is not None
    shares = [(share.name, share.text, share.percent) for share in section.shares]
    assert shares == [
        ("merged and quantized", "6 K", 60),
        ("merged", "1 K", 10),
        ("left as the base has them", "3 K", 30),
    ]
    assert section.folded["Tensors that a run leaves as the base has them"].rows == [("logit_scale",), ("and 2 more",)]


def test_a_model_and_a_checkpoint_on_one_page() -> None:
    mixed = checkpoint("c", {"layers.0.q": 3, "layers.1.q": 4})
    text = inspect_page({"models": [model("m"), mixed]})
    assert headings(text, 1) == ["2 models"]
    assert headings(text) == ["m", "c"]
    assert headings(text, 3) == [
        *("Parameters by part", "Types of numbers"),
        *("Quantized linears", "Bits of each linear", "Types of numbers"),
    ]
    assert re.findall(r'class="swatch" style="background: var\(--heat-8\)".*?<li>(.*?)</li>', text) == ["4 bits"]
    alone = inspect_page({"models": [checkpoint("c", {"layers.0.q": 4, "layers.1.q": 4})]})
    assert headings(alone, 1) == ["c"]
    assert headings(alone) == ["Quantized linears", "Types of numbers"]
