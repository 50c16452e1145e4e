"""Oracles: what Chromium makes of the pages, and axe-core's rules for contrast and accessibility."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epmq_cli.report.page.comparison import comparison_page
from epmq_cli.report.page.page import run_page
from epmq_cli.report.run_folders import Run
from tests.helpers.browser import WIDTHS, seen, violations
from tests.helpers.reports import content, layer

EVIL = "<script>window.broken = true</script>"
LINEARS = [
    layer(f"encoder.layers.{block}.{name}", 10.0 ** -(block + 1), 3 + block) for block in (0, 1) for name in "qkv"
]
TRAINING = {
    "trials": [{"lr": 0.1, "losses": [2.0, 1.0, 1.5], "agreements": [0.5, 0.6, 0.6], "best": 1}],
    "refined": True,
}
BLOCK = {
    "name": "encoder.0",
    "iteration": 40,
    "error_before": 0.3,
    "error": 0.1,
    "held_out_before": 0.4,
    "held_out": 0.2,
}
FULL = content(
    {EVIL: (0.1, 0.5, 0.8, 0.9), "b" * 60: (0.2, 0.4, 0.3, 0.9)},
    layers=LINEARS,
    refine={"dense": TRAINING},
    blocks=[BLOCK],
)
PERPLEXITIES = content({"code": (30.0, 12.0, 9.0, 8.0)}, "perplexity")
ONE = {"full": FULL, "perplexity": PERPLEXITIES, "one task": content({"a": (-0.1, 0.5, 0.8, 0.9)}, "spearman")}
SEVERAL = [
    Run(Path(f"/r/{bits}"), content({"a": (0, 0.4, bits / 9, 1)}, overrides=[f"bits={bits}"])) for bits in (2, 4)
]
PAGES = {name: run_page(found) for name, found in ONE.items()} | {"comparison": comparison_page(SEVERAL)}


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name: str, width: int, tmp_path: Path) -> None:
    texts = seen(PAGES[name], tmp_path, width)
    if name == "full" and width > 640:  # narrow figures shorten names
        assert "<script>" in texts


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_violation(name: str, dark: bool, tmp_path: Path) -> None:
    assert violations(PAGES[name], tmp_path, dark) == []


def test_the_page_forbids_scripts_and_requests() -> None:
    assert all(re.search(r"default-src 'none'; style-src 'unsafe-inline'", page) for page in PAGES.values())
