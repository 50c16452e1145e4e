"""Oracles: what Chromium makes of the pages, and axe-core's rules for contrast and accessibility."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epmq_cli.report.page.comparison import comparison_page
from epmq_cli.report.page.page import run_page
from epmq_cli.report.run_folders import Run
from tests.helpers.browser import evaluated, needs_axe, needs_chromium
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

LOOK = """
const shown = [...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
return {
  requests: performance.getEntriesByType('resource').length,
  broken: window.broken === true,
  scripts: document.scripts.length,
  marks: shown.map(svg => svg.querySelectorAll('path, use').length),
  texts: shown.map(svg => svg.textContent).join(' '),
  named: shown.every(svg => svg.getAttribute('role') === 'img' && svg.querySelector('title').textContent),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  smallest: Math.min(...shown.map(svg => Math.min(...[...svg.querySelectorAll('text')]
    .map(text => text.getBoundingClientRect().height)))),
  outside: shown.flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect(), box = svg.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2;
  }).map(text => text.textContent)),
};
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 820, 1400])  # Chromium's windows are at least 500 pixels wide
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name: str, width: int, tmp_path: Path) -> None:
    needs_chromium()
    found, said = evaluated(PAGES[name], LOOK, tmp_path, width, dark=width == 1400)
    assert said == ""
    assert (found["requests"], found["broken"], found["scripts"]) == (0, False, 1)  # the test's own script
    assert found["marks"]
    assert min(found["marks"]) >= 2
    assert found["named"]
    assert found["overflow"] <= 0
    assert found["smallest"] >= 10
    assert found["outside"] == []
    if name == "full" and width > 640:  # narrow figures shorten names
        assert "<script>" in found["texts"]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_violation(name: str, dark: bool, tmp_path: Path) -> None:
    axe = needs_axe()
    check = "document.querySelectorAll('details').forEach(part => part.open = true); "
    check += "const found = await axe.run(); return found.violations.map(v => [v.id, v.nodes[0].html]);"
    page = PAGES[name].replace("</body>", f"<script>{axe}</script></body>")
    violations, _ = evaluated(page, check, tmp_path, dark=dark)
    assert violations == []


def test_the_page_forbids_scripts_and_requests() -> None:
    assert all(re.search(r"default-src 'none'; style-src 'unsafe-inline'", page) for page in PAGES.values())
