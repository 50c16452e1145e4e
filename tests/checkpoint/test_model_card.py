"""Oracles: CommonMark: nothing in a name may become HTML, a link, a heading or the end of a code span; the reader of
cards in huggingface_hub; the code of the card, which is run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from omegaconf import OmegaConf
from PIL import Image
from transformers import BertConfig, BertModel

from epmq_cli.checkpoint.card_metadata import hub_id, license_of
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.loading_code import FOLDER
from epmq_cli.checkpoint.model_card import ModelCard, loading_code
from epmq_cli.checkpoint.task_heads import read_heads
from epmq_cli.commands.run import run
from epmq_cli.commands.verify import verify
from epmq_cli.data.suite import Suite
from epmq_cli.data.table import Table
from epmq_cli.families.bert import BERT
from epmq_cli.families.family import load_model
from tests.checkpoint.conftest import Made
from tests.helpers.hubs import CHOICES, config
from tests.helpers.minihub import KINDS
from tests.helpers.packs import exporter_of
from tests.helpers.tiers import only

SMALL = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
EVIL = "<script>alert(1)</script> [x](javascript:1)\n# heading `code` **bold** ![i](u) _it_ &amp; $base"
SHOWN = (
    r"&lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:1) \# heading \`code\` \*\*bold\*\* "
    r"!\[i\](u) \_it\_ &amp;amp; $base"
)


def made_card(name: str, source: str, overrides: Sequence[str] = (), **fields: Any) -> ModelCard:
    entry = {"expert": source, "data": Table("a.tsv", "b.tsv")}
    suite = Suite(name=name, family="bert", base=source, tasks={name: entry})
    base = Base(SMALL.to_dict(), None)
    code = loading_code(BERT, BertModel(SMALL), suite, (), exporter_of("compressed_tensors"), base)
    return ModelCard(
        suite=suite,
        pipeline="text-classification",
        choices={"merge": "ties", "guidance": "feature", "quant": "gptq", "refine": "none"},
        formats=(),
        exporter=exporter_of("compressed_tensors"),
        loading=code,
        overrides=overrides,
        **{"bits": None, **fields},
    )


def scores(task: str) -> dict[str, Any]:
    stages = {"merged": 0.5, "quantized": 0.75}
    return {"metrics": {task: "accuracy"}, "tasks": {task: stages}, "average": stages}


def card(name: str, source: str) -> str:
    """The card below its metadata."""
    return made_card(name, source).text(scores(name)).partition("\n---\n")[2]


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
    for line in text.partition("## Load")[0].splitlines():
        assert "<script" not in re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)


@pytest.mark.usefixtures("pages")
def test_a_task_called_script_is_run_packed_and_verified(clip_hub: Path, tmp_path: Path) -> None:
    cfg = config(clip_hub, "calib.samples=8", "eval.samples=8")
    OmegaConf.set_struct(cfg, False)
    cfg.suite.tasks = {"<script>": cfg.suite.tasks.first, "../up": cfg.suite.tasks.second}
    run(cfg, tmp_path, [], CHOICES)
    verify(tmp_path / "checkpoint", True, "cpu", None)
    text = (tmp_path / "checkpoint" / "README.md").read_text().partition("\n---\n")[2]
    assert "(&lt;script&gt;)" in text
    assert "| &lt;script&gt; | accuracy |" in text
    assert re.search(r"\n\n!\[Accuracy in % of base, merge, result and experts by task\. .*\]\(scores\.png\)\n\n", text)
    assert (tmp_path / "checkpoint" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "scores.png" in json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())["files"]
    assert "<script>" not in text + (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "metrics.json", "report.html"}


@pytest.mark.parametrize(
    "name", ["mnli", EVIL, "a: [b", "- x", "---", "\n---\n# y", "'", "yes", "0x1f", "\U0001f600 \x07"]
)
def test_the_hub_reads_the_metadata_whatever_names_contain(name: str) -> None:
    text = made_card(name, "owner/base@v1", bits=4.0, license="mit").text(scores(name))
    found = HubCard(text, ignore_metadata_errors=False).data
    assert (found.library_name, found.pipeline_tag, found.license) == ("transformers", "text-classification", "mit")
    assert found.base_model == ["owner/base"]
    assert found.to_dict()["base_model_relation"] == "quantized"
    assert found.tags == ["merge", "quantization", "compressed-tensors", "epmq"]
    (result,) = found.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.75)
    assert (found.model_name, result.dataset_name) == (name, name)


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    front = made_card("mnli", str(tmp_path / "base")).text().split("---\n")[1]
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["merge", "compressed-tensors", "epmq"],
    }


def test_hub_ids_are_those_of_sources_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    sources = ["owner/name", "owner/name@v2", "owner/name:runs/a.pt", "open_clip:hf-hub:owner/name"]
    assert [hub_id(source) for source in sources] == ["owner/name"] * 4
    assert [hub_id(x) for x in ("models/base", "shipped:tiny/base", "gpt2", "/a/b", "open_clip:ViT-B-32/openai")] == [
        None
    ] * 5


@pytest.mark.parametrize(
    ("config", "readme", "expected"),
    [
        ('{"license": "mit"}', "", "mit"),
        ("{}", "---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n", "apache-2.0"),
        ("{}", "# Base\nlicense: mit\n", None),
        ("{}", "---\nlicense: [a, b]\n---\n", None),
        ("{}", "---\nlicense: 'x\n  y: z'\n---\n", None),
        ("[]", "---\nlicense: {\n---\n", None),
    ],
)
def test_the_licence_is_that_of_the_base(config: str, readme: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "README.md").write_text(readme)
    assert license_of(tmp_path) == expected


def test_the_command_has_the_options_that_make_the_result() -> None:
    text = made_card("mnli", "a/b", ["merge=ties", "suite.experts={a: b/c}", "out=/home/me", "calib.memory=1GB"]).text()
    assert "\n```bash\nepmq run merge=ties 'suite.experts={a: b/c}'\n```\n" in text
    assert "/home/me" not in text
    assert "\nepmq run --config-dir FOLDER suite=mine\n" in made_card("mnli", "a/b", ["suite=mine"]).text()
    assert "\n````bash\nepmq run 'a=```b'\n````\n" in made_card("mnli", "a/b", ["a=```b"]).text()


def python_code(card: str) -> str:
    """The blocks of Python that the text of a card contains, for transformers and a head."""
    blocks = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.S | re.M)
    return "\n".join(code for _, code in blocks if "epmq_cli" not in code)


@pytest.mark.parametrize("kind", only(("vit", "roberta", "llama"), ("clip", "bert", *KINDS)))
def test_the_code_of_the_card_runs_and_gives_the_logits(
    kind: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the family's own logits, of the checkpoint's model and heads."""
    checkpoint, scene = made(kind)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), (200, 30, 90)).save("picture.png")
    code = python_code((checkpoint / "README.md").read_text())
    names: dict[str, Any] = {}
    with torch.inference_mode():
        exec(code.replace(FOLDER, str(checkpoint)), names)
        if scene.family.heads == "none":
            assert len(names["tokens"][0]) > 0
            return
        model = load_model(scene.family, checkpoint, torch.device("cpu"))
        heads = read_heads(checkpoint, scene.job.suite, scene.family, torch.device("cpu"))
        features = scene.family.features(model, dict(names["inputs"]))
        wanted = scene.family.logits(model, features, heads["first"])
    assert names["logits"].shape == (1, 3)
    torch.testing.assert_close(names["logits"], wanted)
    if scene.family.heads == "own":  # CLIP's classes are the same in both tasks
        assert not torch.allclose(wanted, scene.family.logits(model, features, heads["second"]))
