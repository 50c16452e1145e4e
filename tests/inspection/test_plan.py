"""Oracles: the sentences of the run, the sizes of a real checkpoint, and the number of operations of one linear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.inspection.operations import Operations
from epmq_cli.inspection.plan import plan_content
from epmq_cli.inspection.throughput import Throughput
from epmq_cli.pipeline.preflight import check_groups
from epmq_cli.quantize.formats.int import IntFormat
from tests.conftest import Run
from tests.helpers.hubs import run_in
from tests.helpers.minihub import decoder_hub

FEW = ("calib.samples=8", "eval.samples=4", "group_size=16")


def plan(hub: Path, *overrides: str) -> dict:
    search = f"hydra.searchpath=[file://{hub / 'configs'}]"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plan_content(compose("run", overrides=["suite=mini", "out=x", search, *FEW, *overrides]))


def test_a_plan_counts_samples_tokens_and_weights(clip_hub: Path) -> None:
    content = plan(clip_hub)
    assert content["refused"] == []
    estimate = content["estimate"]
    assert estimate["calibration_tokens"] == 2 * 8 * (4 + 1)  # two tasks, pictures of 2 x 2 patches and a class token
    assert estimate["test_tokens"] == 2 * 4 * 5
    assert content["quantized"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert estimate["memory"]["host"] > estimate["memory"]["process"] > 0
    assert estimate["total_seconds"] == pytest.approx(sum(estimate["seconds"].values()), abs=0.01)


def test_a_plan_refuses_in_the_words_of_the_run(bert_hub: Path) -> None:
    content = plan(bert_hub, "group_size=24")
    model = FAMILIES["bert"].load(bert_hub / "base", weights=False)
    with pytest.raises(ConfigError) as wanted:
        check_groups(model, FAMILIES["bert"], [IntFormat(4, 24, "none")])
    assert content["refused"] == [str(wanted.value)]


@pytest.mark.slow
def test_a_plan_refuses_test_data_without_answers(tmp_path: Path) -> None:
    hub = decoder_hub(tmp_path, "llama")
    [first, second] = plan(hub, "+suite.each={assistant_only_loss: true}")["refused"]
    assert first.startswith("task first: its test samples are texts, and suite.tasks.first.assistant_only_loss=true")
    assert second.startswith("task second: its test samples are texts")


def test_seconds_are_operations_over_their_rates() -> None:
    speed = Throughput(single=100, double=10, call=0.5, bytes=1000)
    assert speed.seconds(Operations(single=200, double=20, calls=4, bytes=500)) == 2 + 2 + 2 + 0.5


@pytest.mark.slow
def test_the_disk_that_is_planned_is_that_of_the_checkpoint(clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path, clip_hub, *FEW)
    written = json.loads((tmp_path / "metrics.json").read_text())["bytes"]["model_packed"]
    assert plan(clip_hub)["estimate"]["disk"]["checkpoint"] == pytest.approx(written, rel=0.1)


@pytest.mark.slow
def test_a_plan_has_the_sizes_that_a_budget_can_buy(bert_hub: Path) -> None:
    sizes = plan(bert_hub, "budget=1MB")["estimate"]["budget"]
    assert 0 < sizes["smallest"] < sizes["largest"] < sizes["bytes"] == 1_000_000
    middle = (sizes["smallest"] + sizes["largest"]) // 2000
    assert plan(bert_hub, f"budget={middle}KB")["estimate"]["disk"]["checkpoint"] == 1000 * middle
    assert "is too small: the weight files of this model take" in plan(bert_hub, "budget=10KB")["refused"][0]


def test_a_plan_of_models_that_are_not_here_says_so(epmq_inside: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ("suite=causal_lm", "suite.base=nobody/nothing", "suite.experts={a: nobody/a}")
    result = epmq_inside("run", "--plan", *given)
    assert result.returncode == 1
    assert "base: nobody/nothing is not on this machine" in result.stdout
    assert not Path("runs").exists()
    assert torch.get_default_dtype() == torch.float32
