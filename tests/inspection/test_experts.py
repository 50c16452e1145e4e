"""Oracles: the sentences of `SuiteModels`, and the configs and files of the folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from epmq_cli.inspection.experts import config_differences, experts_content, named
from epmq_cli.models.model_folder import ModelFolder


def test_names_are_short_and_different() -> None:
    assert named(["a/x/model", "a/y/model", "b/z.pt"]) == {
        "x_model": "a/x/model", "y_model": "a/y/model", "z": "b/z.pt"
    }  # fmt: skip
    assert len(named(["m", "m"])) == 2


def test_every_expert_that_does_not_fit_is_named(bert_hub: Path, clip_hub: Path) -> None:
    paths = [str(clip_hub / "first"), str(bert_hub / "second"), str(clip_hub / "second")]
    content = experts_content((str(bert_hub / "base"), paths, None), "auto", "same", None)
    assert len(content["refused"]) == 2
    assert all("family bert takes bert" in sentence for sentence in content["refused"])


def test_configs_and_tokenizers_that_differ_are_shown(bert_hub: Path, tmp_path: Path) -> None:
    expert = shutil.copytree(bert_hub / "first", tmp_path / "expert")
    for file in bert_hub.joinpath("base").glob("tokenizer*"):
        shutil.copy(file, expert)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.5}))
    content = experts_content((str(bert_hub / "base"), [str(expert)], None), "auto", "same", None)
    assert content["configs"]["hidden_dropout_prob"]["expert"] == 0.5
    assert content["processors"]["expert"].startswith(("the same files as the base", "other files than the base"))
    assert content["refused"] == []
    base = ModelFolder(bert_hub / "base", "base")
    assert config_differences(base, {"base again": base}) == {}
