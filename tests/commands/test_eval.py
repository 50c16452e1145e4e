"""Oracles: the scores of the run that wrote the checkpoint, and its own JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from epmq_cli.commands.eval import evaluate
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.report.metrics_json import schema
from tests.helpers.hubs import eval_config, run_in
from tests.helpers.tiers import only, slow


@pytest.mark.parametrize(
    ("kernel", "packed"), [("dequantize", 0), ("int4", 12), slow(("auto", 12)), slow(("exact", 0))]
)
def test_every_kernel_gives_the_scores_of_the_run(kernel: str, packed: int, clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", clip_hub, "group_size=32")
    (tmp_path / "again").mkdir()
    evaluate(eval_config(checkpoint, f"eval.kernel={kernel}"), tmp_path / "again", [])
    run, found = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "run", tmp_path / "again"))
    jsonschema.validate(found, schema())
    assert found["kernels"]["int4"] == packed
    for task, scores in found["scores"]["tasks"].items():
        assert scores["quantized"] == pytest.approx(run["scores"]["tasks"][task]["quantized"], abs=0.05)


@pytest.mark.parametrize(("kernel", "packed"), [("dequantize", 0), ("int4", 12)])
def test_a_run_scores_on_the_requested_kernel(kernel: str, packed: int, clip_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path, clip_hub, "group_size=32", f"eval.kernel={kernel}", "eval.stages=[quantized]")
    found = json.loads((tmp_path / "metrics.json").read_text())
    jsonschema.validate(found, schema())
    assert found["kernels"]["int4"] == packed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("eval.kernel=marlin",), "eval.kernel must be one of auto, int4, exact, dequantize, got 'marlin'"),
        (("group_size=16",), "kernel=int4 cannot take .*: 16 input columns share a scale"),
        (("group_size=32", "bits=6"), "kernel=int4 cannot take .*: it has 6 bits"),
        (("quant=none",), "kernel=int4 needs quantized linears, but the model has none"),
    ],
)
def test_a_run_that_the_kernel_cannot_score_is_refused_first(
    options: tuple[str, ...], message: str, clip_hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_in(tmp_path, clip_hub, "eval.kernel=int4", *options)
    assert list(tmp_path.iterdir()) == []


def test_an_unused_kernel_is_not_refused(clip_hub: Path, tmp_path: Path) -> None:
    assert run_in(tmp_path, clip_hub, "eval.kernel=int4", "group_size=16", "eval.stages=[]").is_dir()


def no_quantization(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def other_bits(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def fewer_layers(config: dict[str, Any]) -> None:
    config["vision_config"]["num_hidden_layers"] -= 1


def more_layers(config: dict[str, Any]) -> None:
    config["text_config"]["num_hidden_layers"] += 1


CHANGES = (no_quantization, other_bits, fewer_layers, more_layers)
KERNELS = ("dequantize", "auto")


@pytest.mark.parametrize(("change", "kernel"), only(zip(CHANGES, 2 * KERNELS, strict=True), product(CHANGES, KERNELS)))
def test_a_config_of_another_model_is_refused(
    change: Callable[[dict[str, Any]], None], kernel: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"config.json describes another model than the files beside it"
    ) as raised:
        evaluate(eval_config(checkpoint, f"eval.kernel={kernel}"), tmp_path, [])
    assert "\n" not in str(raised.value)
