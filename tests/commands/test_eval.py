"""Oracles: the scores of the run that wrote the checkpoint, and its own JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from epmq_cli.commands.eval import evaluate
from epmq_cli.config import conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.report.metrics import schema
from tests.hubs import run_in


def config_of_eval(checkpoint: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("eval", overrides=[f"checkpoint={checkpoint}", "device=cpu", *overrides])


@pytest.mark.parametrize(("kernel", "packed"), [("dequantize", 0), ("int4", 12), ("auto", 12)])
def test_every_kernel_gives_the_scores_of_the_run(kernel: str, packed: int, clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path / "run", clip_hub, "group_size=32")
    (tmp_path / "again").mkdir()
    evaluate(config_of_eval(checkpoint, f"eval.kernel={kernel}"), tmp_path / "again", [])
    run, found = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "run", tmp_path / "again"))
    jsonschema.validate(found, schema())
    assert found["kernels"]["int4"] == packed
    for task, scores in found["scores"]["tasks"].items():
        assert scores["quantized"] == pytest.approx(run["scores"]["tasks"][task]["quantized"], abs=0.05)


def test_a_run_scores_on_the_kernel_that_is_asked_for(clip_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval.kernel must be one of auto, int4, dequantize, got 'marlin'"):
        run_in(tmp_path / "refused", clip_hub, "eval.kernel=marlin")
    run_in(tmp_path / "run", clip_hub, "group_size=32", "eval.kernel=int4")
    assert (tmp_path / "run" / "metrics.json").is_file()
