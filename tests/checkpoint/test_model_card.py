"""Oracle: CommonMark. Nothing in a name may become HTML, a link, a heading or the end of a code span."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from epmq_cli.checkpoint.model_card import model_card
from epmq_cli.commands.run import run
from epmq_cli.commands.verify import verify
from epmq_cli.data.suite import Suite
from epmq_cli.data.table import Table
from tests.helpers.hubs import CHOICES, config
from tests.helpers.packs import exporter_of

EVIL = "<script>alert(1)</script> [x](javascript:1)\n# heading `code` **bold** ![i](u) _it_ &amp; $base"
SHOWN = (
    r"&lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:1) \# heading \`code\` \*\*bold\*\* "
    r"!\[i\](u) \_it\_ &amp;amp; $base"
)


def card(name: str, source: str) -> str:
    entry = {"expert": source, "data": Table("a.tsv", "b.tsv")}
    suite = Suite(name=name, family="bert", base=source, tasks={name: entry})
    return model_card(suite, ("ties", "feature", "gptq"), (), None, exporter_of("compressed_tensors"), "BertModel")


def test_plain_names_stay_unchanged() -> None:
    text = card("ox-ford_pets", "owner/base")
    assert "\n# ox-ford_pets: one model of 1 experts\n" in text
    assert "\n- base: `owner/base`\n- experts: `owner/base` (ox-ford_pets)\n" in text
    assert "merged with `ties`, calibrated with `feature`, quantized with `gptq`." in text


def test_names_of_suites_and_tasks_are_text() -> None:
    text = card(EVIL, "owner/base")
    assert f"\n# {SHOWN}: one model of" in text
    assert f"({SHOWN})" in text
    assert "<script" not in text


def test_sources_stay_inside_their_code_span() -> None:
    text = card("mnli", "a`b``c\n# heading <script>")
    assert "\n- base: ``` a`b``c # heading <script> ```\n" in text
    for line in text.splitlines():
        assert "<script" not in re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)


def test_a_task_called_script_is_run_packed_and_verified(clip_hub: Path, tmp_path: Path) -> None:
    cfg = config(clip_hub, "calib.samples=8", "eval.samples=8")
    OmegaConf.set_struct(cfg, False)
    cfg.suite.tasks = {"<script>": cfg.suite.tasks.first, "../up": cfg.suite.tasks.second}
    run(cfg, tmp_path, [], CHOICES)
    verify(tmp_path / "checkpoint", True, "cpu", None)
    text = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "(&lt;script&gt;)" in text
    assert "<script>" not in text + (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "metrics.json", "report.html"}
