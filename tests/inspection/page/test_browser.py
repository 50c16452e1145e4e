"""Oracles: what Chromium makes of the pages, and axe-core's rules for contrast and accessibility."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.inspection.page.page import inspect_page
from tests.helpers.browser import WIDTHS, seen, violations
from tests.helpers.inspected import checkpoint, experts, model, task_vectors

EVIL = "<script>window.broken = true</script>"
MANY = [EVIL, *(f"expert {number}" for number in range(19))]
LINEARS = {f"encoder.layers.{block}.{name}.weight": (4, 4) for block in range(12) for name in ("q", "k", "b" * 60)}
PAGES = {
    "many experts": {"models": [], "experts": experts(MANY, task_vectors(MANY, LINEARS), ("no",))},
    "two experts": {"models": [], "experts": experts(["a", "b"], task_vectors(["a", "b"], LINEARS))},
    "checkpoint": {"models": [model("m"), checkpoint("c" * 90, {"layers.0.q": 3, "layers.1.q": 4, "layers.2.q": 8})]},
}


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name: str, width: int, tmp_path: Path) -> None:
    texts = seen(inspect_page(PAGES[name]), tmp_path, width)
    if name == "many experts" and width > 640:  # narrow figures shorten names
        assert "<script>" in texts


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_violation(name: str, dark: bool, tmp_path: Path) -> None:
    assert violations(inspect_page(PAGES[name]), tmp_path, dark) == []
