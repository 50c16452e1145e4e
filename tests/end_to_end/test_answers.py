"""`assistant_only_loss` in whole commands. Oracles: `epmq eval` of the checkpoint, and runs without the option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.commands.eval import evaluate
from tests.helpers.hubs import eval_config, run_in
from tests.helpers.talks import talking

pytestmark = pytest.mark.slow

OPTION = "+suite.each={assistant_only_loss: true}"


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


def test_runs_and_eval_count_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps the scores of both options apart, and the tensors do not depend on it."""
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path / "cache"))
    hub, found = talking(tmp_path / "hub"), {}
    for name, options in {"whole": (), "answers": (OPTION,), "again": (OPTION,)}.items():
        run_in(tmp_path / name, hub, "cache=1MB", *options)
        (tmp_path / "eval" / name).mkdir(parents=True)
        evaluate(eval_config(tmp_path / name / "checkpoint"), tmp_path / "eval" / name, [])
        found[name] = metrics(tmp_path / name)
        scores, own = metrics(tmp_path / "eval" / name)["scores"]["tasks"], found[name]["scores"]["tasks"]
        assert [each["quantized"] for each in scores.values()] == [each["quantized"] for each in own.values()]
    whole, answers, again = found.values()
    assert answers["scores"] == again["scores"]
    assert answers["agreement"] == again["agreement"]
    assert again["cache"]["made"] == 0
    for task in ("first", "second"):
        for stage in ("base", "experts", "merged", "quantized"):
            assert whole["scores"]["tasks"][task][stage] != answers["scores"]["tasks"][task][stage]
        assert whole["agreement"][task]["merged"]["kl"] != answers["agreement"][task]["merged"]["kl"]
    files = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in found]
    assert files[0] == files[1] == files[2]
