"""Oracles: the documentation of the shipped suites that require models, and transformers, which loads the results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPModel, RobertaModel

from tests.conftest import TASKS, drifted
from tests.end_to_end.test_published import run_suite
from tests.families.test_open_clip import MODEL
from tests.helpers.minihub import decoder_hub, encoder_hub
from tests.helpers.mirror import LAYOUTS, glue_mirror, image_mirror, write_rows

pytest.importorskip("datasets", reason="needs the extra hub")


def experts(folder: Path, names: list[str]) -> str:
    """`suite.experts` with the models of a miniature hub under these names."""
    models = ", ".join(f"{name}: '{folder / task}'" for name, task in zip(names, TASKS, strict=True))
    return f"suite.experts={{{models}}}"


def test_any_decoder_runs_on_texts_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, mirror = decoder_hub(tmp_path / "models", "qwen3"), tmp_path / "mirror"
    for split in ("train", "test"):
        rows = [{"text": text} for text in ["", " = A photo = ", *(f"it is a red film not good {i}" for i in range(9))]]
        folder = mirror / "datasets/Salesforce/wikitext/wikitext-2-raw-v1"
        write_rows(folder / f"{split}-00000-of-00001.parquet", rows, {"text": "string"})
    options = [
        "suite=causal_lm",
        f"suite.base={hub / 'base'}",
        experts(hub, ["math", "code"]),
        "suite.each.max_length=10",
    ]
    metrics = run_suite(tmp_path / "run", mirror, monkeypatch, *options, "eval.samples=11", "suite.each.documents=8")
    assert list(metrics["scores"]["tasks"]) == ["math", "code"]
    assert metrics["scores"]["metrics"] == {"math": "perplexity", "code": "perplexity"}
    assert all(score > 1 for scores in metrics["scores"]["tasks"].values() for score in scores.values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")


def test_any_classifier_of_texts_runs_on_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = encoder_hub(tmp_path / "models", "roberta")
    tasks = "{cola: {metric: matthews, data: {name: cola, input: sentence}}, "
    tasks += "rte: {data: {name: rte, input: [sentence1, sentence2]}}}"
    options = [
        f"suite.base={hub / 'base'}",
        experts(hub, ["cola", "rte"]),
        f"suite.tasks={tasks}",
        "suite.each.max_length=16",
    ]
    metrics = run_suite(tmp_path / "run", glue_mirror(tmp_path / "mirror"), monkeypatch, "suite=seq_cls", *options)
    assert metrics["scores"]["metrics"] == {"cola": "matthews", "rte": "accuracy"}
    RobertaModel.from_pretrained(tmp_path / "run" / "checkpoint", add_pooling_layer=False)


def test_mirrored_models_are_found_by_id_and_their_family_by_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = glue_mirror(tmp_path / "mirror")
    encoder_hub(mirror / "owner", "distilbert")
    options = ["suite.base=owner/base", "suite.experts={cola: owner/first}", "suite.each.max_length=16"]
    options += ["suite.tasks={cola: {data: {name: cola, input: sentence}}}", "eval.stages=[quantized]"]
    metrics = run_suite(tmp_path / "run", mirror, monkeypatch, "suite=seq_cls", *options)
    assert list(metrics["scores"]["tasks"]) == ["cola"]


@pytest.mark.slow
def test_open_clip_experts_run_on_the_published_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    tasks, base = list(LAYOUTS)[:8], tmp_path / "base"
    base.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(MODEL)).eval()
    save_file(model.state_dict(), base / "open_clip_model.safetensors")
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    for seed, task in enumerate(tasks):
        torch.save(drifted(model.visual, seed).state_dict(), tmp_path / f"{task}.pt")
    options = ["suite=open_clip_vit_b32", f"suite.base={base}", f"suite.experts='{tmp_path}/{{task}}.pt'"]
    metrics: Any = run_suite(tmp_path / "run", image_mirror(tmp_path / "mirror", tasks), monkeypatch, *options)
    assert list(metrics["scores"]["tasks"]) == tasks
    CLIPModel.from_pretrained(tmp_path / "run" / "checkpoint")
