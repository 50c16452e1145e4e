"""Oracles: the rules of HTML and WCAG; names, losses and stacks worked out by hand."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.report.page import assembly, heat_map, page, summary, svg
from epmq_cli.report.page.comparison import comparison_page
from epmq_cli.report.page.config import command
from epmq_cli.report.run_folders import Run
from tests.helpers.markup import Ids
from tests.helpers.reports import content, layer, write_run

pytestmark = pytest.mark.usefixtures("pages")

EVIL = "<script>alert(1)</script>"
CSS = (assembly.TEMPLATES / "style.css").read_text()
MODES = re.findall(r":root \{(.*?)\}", CSS, re.S)


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


def test_blocks_that_were_refined_have_a_section() -> None:
    """Of two blocks the second stays as it was; the mean of 0.4 and 0.2 is 0.3, of 0.1 and 0.2 it is 0.15."""
    keys = ("name", "iteration", "error_before", "error", "held_out_before", "held_out")
    blocks = [("encoder.0", 40, 0.3, 0.08, 0.4, 0.1), ("encoder.1", 0, 0.2, 0.2, 0.2, 0.2)]
    found = content({"a": (0, 0.5, 0.6, 1)}, blocks=[dict(zip(keys, block, strict=True)) for block in blocks])
    text = page.run_page(found)
    assert "1 of 2 blocks changed; the mean error on the samples that choose the result falls from 0.3 to 0.15." in text
    assert '<th scope="row">encoder.0</th><td class="number">40</td><td class="number">0.3</td>' in text
    assert '<th scope="row">encoder.1</th><td class="number">as it was</td>' in text
    kept = content({"a": (0, 0.5, 0.6, 1)}, blocks=[dict(zip(keys, blocks[1], strict=True))])
    assert "No block changed: no iteration lowered the error" in page.run_page(kept)


def test_the_losses_that_chose_the_bits_have_a_table() -> None:
    candidates = [{"format": name, "loss": loss, "bytes": 9} for name, loss in (("int3", 0.25), ("int4", 0.0625))]
    group = {"linears": ["a.0.q", "a.0.k"], "weights": 8, "chosen": "int4", "candidates": candidates}
    found = content({"a": (0, 0.5, 0.6, 1)}, sensitivity=[group])
    found["layers"] = [layer("a.0.q", 0.1, 4), layer("a.0.k", 0.1, 4), layer("a.0.o", 0.1, 3)]
    numbers = "".join(f'<td class="number">{value}</td>' for value in (8, 0.25, 0.0625))
    assert f'<th scope="row">a.0.q and 1 more</th>{numbers}<td>int4</td></tr>' in page.run_page(found)
    group |= {
        "group_size": 64,
        "candidates": [{**one, "group_size": 64 // (1 + i)} for i, one in enumerate(candidates)],
    }
    found["layers"] = [layer("a.0.q", 0.1, 4), layer("a.0.k", 0.1, 4)]
    text = page.run_page(found)
    assert f"{numbers}<td>int4, groups of 64</td></tr>" in text
    assert '<th scope="col" class="number">int4, groups of 32</th>' in text


def test_the_noise_of_the_average_is_told() -> None:
    """Of two tasks with 3 % each it is 2.1 %."""
    scores = {"a": (0.1, 0.5, 0.8, 0.9), "b": (0.1, 0.5, 0.8, 0.9)}
    assert "The standard error of the result&#39;s average is 2.1." in page.run_page(content(scores, error=0.03))
    assert "standard error" not in page.run_page(content(scores))


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
    stacks = heat_map.by_stack([layer(name, 1.0) for name in names], lambda entry: heat_map.Cell(entry["loss"]))
    assert {name: {linear: list(row) for linear, row in stack.items()} for name, stack in stacks.items()} == {
        "encoder.block": {"layer.1.wi": [0, 10]},
        "decoder.block": {"q": [0]},
        "": {"visual_projection": [0]},
    }


def test_the_steps_of_colours_are_even_on_a_logarithmic_scale() -> None:
    level = heat_map.logarithmic([1e-4, 1e-1, 0.0])
    assert [level(value) for value in (0.0, 1e-4, 2e-3, 2e-2, 1e-1)] == [0, 0, 3, 6, 8]
    assert heat_map.logarithmic([0.5, 0.5])(0.5) == 0


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
        text = colours["paper" if step >= heat_map.DARK else "ink"]
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

    size, table = "Score against size", "All runs"
    assert headings(runs("merge=ties", "merge=average")) == [size, "Scores of merge=average", table]
    assert headings(runs("bits=2", "bits=3")) == [size, "Score by bits", "Scores of bits=3", table]
    two = runs("bits=2 seed=1", "bits=3 seed=1", "bits=2 seed=2", "bits=3 seed=2")
    assert headings(two) == [size, "Score by bits and seed", "Scores of bits=3 seed=2", table]


def test_the_plain_counterpart_of_a_run_is_shown(tmp_path: Path) -> None:
    """The best run has none, so the comparison shows the one that has, and so does its own page in a sweep."""
    found = {
        "guided": guided("guidance=feature", 0.7, bits=4),
        "plain": guided("guidance=merged", 0.55, bits=4),
        "best": guided("guidance=feature", 0.8, bits=8),
    }
    runs = [Run(write_run(tmp_path / name, content), content) for name, content in found.items()]
    text = comparison_page(runs)
    assert "This is the best run whose plain GPTQ is known." in text
    assert "<h2>Scores of guidance=feature bits=4</h2>" in text
    assert "average: base 10.0, merged 50.0, plain GPTQ 55.0, quantized 70.0, experts 90.0" in text
    assert page.write_report(tmp_path / "guided", found["guided"])
    assert "plain GPTQ" not in (tmp_path / "guided" / "report.html").read_text()
    (tmp_path / "multirun.yaml").write_text("hydra: {}")
    assert page.write_report(tmp_path / "guided", found["guided"])
    assert "plain GPTQ 55.0" in (tmp_path / "guided" / "report.html").read_text()


def guided(guidance: str, score: float, bits: int) -> dict[str, Any]:
    """The content of a run of two tasks with a guidance and bits."""
    tasks = dict.fromkeys("ab", (0.1, 0.5, score, 0.9))
    made = content(tasks, overrides=[guidance, f"bits={bits}"])
    for group, option in (("guidance", guidance.partition("=")[2]), ("refine", "none"), ("quant", "gptq")):
        made["config"][group] = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    made["config"] |= {"bits": bits, "group_size": 64}
    return made
