"""Oracles: the rules of HTML and WCAG; names, losses and stacks worked out by hand."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from epmq_cli.report.page import layers, page, summary, svg
from epmq_cli.report.page.comparison import comparison_page
from epmq_cli.report.page.config import command
from epmq_cli.report.run_folders import Run
from tests.helpers.reports import content, layer

pytestmark = pytest.mark.usefixtures("pages")

EVIL = "<script>alert(1)</script>"
CSS = (page.TEMPLATES / "style.css").read_text()
MODES = re.findall(r":root \{(.*?)\}", CSS, re.S)


class Ids(HTMLParser):
    """The ids and references of a page, and the tags that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.used: set[str] = set()
        self.loading: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            self.ids += [value or ""] if key == "id" else []
            self.used |= set((value or "").split()) if key == "aria-labelledby" else set()
            self.used |= {value[1:]} if key.endswith("href") and value and value.startswith("#") else set()
        if tag in ("script", "link", "img", "iframe", "object"):
            self.loading.append(tag)


def test_a_page_is_one_file_with_unique_ids_and_names_stay_text() -> None:
    found = content({EVIL: (0.1, 0.5, 0.8, 0.9), "$x$ & _y_": (0.2, 0.5, 0.4, 0.9)})
    text = page.run_page(found)
    parsed = Ids(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.used <= set(parsed.ids)
    assert parsed.loading == []
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert "$x$ &amp; _y_" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert "#0e0" not in text  # every placeholder has become a colour of the page
    assert page.run_page(found) == text


def test_a_page_of_few_numbers_leaves_sections_out() -> None:
    found = content({"a": (0.1, 0.5, 0.8, 0.9)}, layers=[layer("a", None)], stages={})
    del found["scores"]
    text = page.run_page(found)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Config", "Reproduce"]
    merge = {key: found[key] for key in ("created", "overrides", "config", "environment", "stages", "bytes")}
    assert "<h2>Config</h2>" in page.run_page({**merge, "command": "merge"})


def test_a_failure_to_draw_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(found: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setitem(page.SECTIONS, "scores", fail)
    with caplog.at_level(logging.WARNING, "epmq"):
        assert not page.write_report(tmp_path, content({"a": (0.1, 0.5, 0.8, 0.9)}))
    assert caplog.messages == [
        "report.html was not written (RuntimeError: no fonts); epmq report --pages makes it again"
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_sentence_says_what_was_made() -> None:
    target = {
        "merge": "epmq_cli.merge.ties.Ties",
        "guidance": "epmq_cli.calibrate.guidance.Guidance",
        "quant": "x.Gptq",
    }
    found = content({"a": (0.1, 0.5, 0.8, 0.9), "b": (0.1, 0.5, 0.8, 0.9)})
    found["config"] |= {group: {"_target_": kind} for group, kind in target.items()}
    assert summary.sentence(found).startswith(
        "2 experts of tiny merged with ties and quantized to 4 bits with Gptq and "
    )
    assert summary.sentence(found).endswith(
        "; average accuracy 80.0% against 50.0% for the dense merge and 90.0% for the experts, so 75% of the gap is "
        "closed; its weights take 2.50 MB in place of 8.00 MB."
    )


def test_the_command_can_be_typed_again() -> None:
    found = content({"a": (0.1, 0.5, 0.8, 0.9)}, overrides=["bits=3", "out=x", "merge.weights={a: 1}"])
    assert command(found) == "epmq run bits=3 'merge.weights={a: 1}'"
    found["overrides"] = ["suite=mine", "merge=ties", "suite.base=models/base"]
    assert command(found) == "epmq run --config-dir FOLDER suite=mine merge=ties suite.base=models/base"


def test_linears_are_grouped_by_stack_and_block() -> None:
    names = ("encoder.block.0.layer.1.wi", "encoder.block.10.layer.1.wi", "decoder.block.0.q", "visual_projection")
    stacks = layers.by_stack([layer(name, 1.0) for name in names], lambda entry: layers.Cell(entry["loss"]))
    assert {name: {linear: list(row) for linear, row in stack.items()} for name, stack in stacks.items()} == {
        "encoder.block": {"layer.1.wi": [0, 10]},
        "decoder.block": {"q": [0]},
        "": {"visual_projection": [0]},
    }


def test_the_steps_of_colours_are_even_on_a_logarithmic_scale() -> None:
    level = layers.logarithmic([1e-4, 1e-1, 0.0])
    assert [level(value) for value in (0.0, 1e-4, 2e-3, 2e-2, 1e-1)] == [0, 0, 3, 6, 8]
    assert layers.logarithmic([0.5, 0.5])(0.5) == 0


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", MODES, ids=("light", "dark"))
def test_text_and_marks_have_enough_contrast(mode: str) -> None:
    """4.5 for text, 3 for marks (WCAG 2.1 AA), also for text in the cells of heat maps."""
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", mode))
    assert set(colours) == set(svg.COLOURS)
    for name in ("ink", "muted", "accent"):
        assert contrast(colours[name], colours["paper"]) >= 4.5
    assert contrast(colours["ink"], colours["heat-0"]) >= 4.5
    for step in range(9):
        text = colours["paper" if step >= layers.DARK else "ink"]
        assert contrast(text, colours[f"heat-{step}"]) >= 4.5


def test_a_comparison_has_the_plots_of_what_was_swept() -> None:
    def runs(*overrides: str) -> list[Run]:
        rows = enumerate(overrides)
        return [
            (Run(Path(f"/r/{row}"), content({"a": (0, 0.5, 0.6 + row / 10, 1)}, overrides=text.split())))
            for row, text in rows
        ]

    def headings(found: list[Run]) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", comparison_page(found))

    shared = ["Score against size", "All runs"]
    assert headings(runs("merge=ties", "merge=average")) == shared
    assert headings(runs("bits=2", "bits=3")) == [shared[0], "Score by bits", shared[1]]
    two = runs("bits=2 seed=1", "bits=3 seed=1", "bits=2 seed=2", "bits=3 seed=2")
    assert headings(two) == [shared[0], "Score by bits and seed", shared[1]]
