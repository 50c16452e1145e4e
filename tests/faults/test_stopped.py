"""Oracles: the statuses that shells assign to SIGINT and SIGTERM, one sentence, and the run without an interruption."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.data.batching import Batch
from epmq_cli.families.bert import BERT
from tests.faults.driver import at_file, at_stage, attempt, command, files, mini
from tests.helpers.tiers import first

SENTENCE = "epmq: interrupted; start the same command again to continue after the last finished block\n"


@pytest.mark.parametrize(("number", "status"), first(1, [(signal.SIGTERM, 143), (signal.SIGINT, 130)]))
def test_a_signal_ends_a_run_with_a_sentence_and_its_status(
    number: signal.Signals, status: int, bert_hub: Path, tmp_path: Path
) -> None:
    arguments, run = mini(bert_hub, "guidance=feature", "calib.memory=1KB", "out=run"), tmp_path / "run"
    act = lambda: os.kill(os.getpid(), number)  # noqa: E731
    hooks = [
        at_stage(2, act),
        *(at_file(files, run, act) for files in (30, 70)),
        at_stage(8, act),
    ]
    for hook in hooks:
        found, said = command(tmp_path, *arguments, hook=hook)
        assert (found, said.splitlines(keepends=True)[-1]) == (status, SENTENCE)
        assert "Traceback" not in said
        assert not [path for path in run.rglob(".*") if path.name.endswith(".partial") or "activations" in path.name]
        assert not (run / "metrics.json").exists()
    assert command(tmp_path, *arguments)[0] == 0
    assert attempt(tmp_path / "whole", bert_hub, "guidance=feature", "calib.memory=1KB", "eval.samples=8") == 0
    assert files(run)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


def test_scoring_batches_are_halved_on_out_of_memory(
    bert_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of more than 8 samples raise the error of CUDA."""
    real = BERT.features

    def features(model: nn.Module, batch: Batch) -> Tensor:
        if len(batch["input_ids"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    monkeypatch.setattr(BERT, "features", features)
    status, said = command(tmp_path, *mini(bert_hub, "eval.samples=20", "eval.stages=[quantized]", "out=run"))
    assert status == 0, said
    assert "there is not enough memory for scoring with 20 samples at a time; epmq retries with 10\n" in said
    assert "there is not enough memory for scoring with 10 samples at a time; epmq retries with 5\n" in said
    assert "not enough memory for calibration" not in said
