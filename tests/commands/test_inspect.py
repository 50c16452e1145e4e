"""Oracles: what the folders hold, the sentences of a run, and the errors of wrong paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import Run


def test_a_model_is_shown_without_torch_once_its_family_is_known(clip_hub: Path) -> None:
    code = (
        "import sys; from epmq_cli.commands.inspect import main; "
        f"main([{str(clip_hub / 'base')!r}]); print('torch' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
        )
        for _ in range(2)
    ]
    lines = runs[1].stdout.splitlines()
    assert runs[1].returncode == 0, runs[1].stderr
    assert lines[-1] == "False"
    assert "family clip" in lines[1]
    assert max(map(len, lines[1:-1])) <= 80


def test_experts_are_compared_with_their_base(bert_hub: Path, clip_hub: Path, epmq_inside: Run, tmp_path: Path) -> None:
    experts = [str(bert_hub / "first"), str(bert_hub / "second")]
    result = epmq_inside("inspect", *experts, "--base", str(bert_hub / "base"), "--deep", "--format", "json")
    content = json.loads(result.stdout)["experts"]
    assert content["refused"] == []
    assert content["heads_of_experts"] == {"first": 3 * 33, "second": 3 * 33}
    assert content["task_vectors"]["density"] == 0.2
    one = epmq_inside("inspect", str(bert_hub / "base"), "--html", str(tmp_path / "page.html"))
    assert one.stderr == f"wrote {tmp_path / 'page.html'}\n"
    assert "<h2>Parameters by part</h2>" in (tmp_path / "page.html").read_text()
    other = epmq_inside("inspect", str(clip_hub / "first"), "--base", str(bert_hub / "base"))
    assert "refused: expert of task first:" in other.stdout.replace("\n", " ")
    assert "holds a model of type clip_vision_model, family bert takes bert" in " ".join(other.stdout.split())


def test_wrong_paths_are_one_sentence(tmp_path: Path, epmq_inside: Run) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 4)
    texts = {
        "a.pt": "is a pickle, which has no header to read",
        "damaged": "is corrupted or not a safetensors file",
        "no/such/folder": "is neither an existing folder or file",
    }
    for name, text in texts.items():
        result = epmq_inside("inspect", str(tmp_path / name))
        assert result.returncode == 1
        assert text in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_deep_counts_nan(tmp_path: Path, epmq_inside: Run) -> None:
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"x": torch.tensor([3.0, float("nan"), -4.0])}, tmp_path / "model" / "model.safetensors")
    result = epmq_inside("inspect", str(tmp_path / "model"), "--deep", "--format", "json")
    (model,) = json.loads(result.stdout)["models"]
    assert model["values"]["not_finite"] == {"x": 1}
    assert [part["norm"] for part in model["values"]["parts"]] == [5.0]


def test_options_of_a_plan_that_make_no_sense_are_refused(epmq_inside: Run) -> None:
    result = epmq_inside("run", "--plan", "-m", "bits=3,4")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "epmq: epmq run --plan plans one run and takes --config-dir and --format, got -m\n"
