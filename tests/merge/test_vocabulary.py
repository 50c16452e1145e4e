"""Oracles: rows counted by hand, and a checkpoint of the larger size that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

from epmq_cli.data.suite import Suite
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.model_folder import ModelFolder
from tests.conftest import TASKS, write_suite
from tests.helpers.hubs import run_in

SIZES = {"base": 3, "small": 2, "large": 5, "larger": 6}


def model(folder: Path, rows: int, value: float, width: int = 2) -> ModelFolder:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    tensors = {"embed": torch.full((rows, width), value), "bias": torch.full((rows,), value), "w": torch.ones(3, 3)}
    save_file(tensors, folder / "model.safetensors")
    return ModelFolder(folder, folder.name)


def source(folder: Path, vocabulary: str, **rows: int) -> MergeSource:
    names = {name: name for name in ("embed", "bias", "w")}
    models = {
        name: NamedTensors(model(folder / name, size, float(index)), names)
        for index, (name, size) in enumerate(rows.items())
    }
    return MergeSource(models.pop("base"), models, vocabulary)


def test_missing_rows_come_from_the_base_or_from_experts_that_have_them(tmp_path: Path) -> None:
    made = source(tmp_path, "pad", **SIZES)
    assert made.vocabulary_size == 6
    assert made.padded == {"embed": 6, "bias": 6}
    expected = {
        "base": [0, 0, 0, 2.5, 2.5, 3],
        "small": [1, 1, 0, 2.5, 2.5, 3],
        "large": [2] * 5 + [3],
        "larger": [3] * 6,
    }
    for name, rows in expected.items():
        for tensor in ("embed", "bias"):
            found = made.base(tensor) if name == "base" else made.expert(name, tensor)
            assert found.flatten().tolist() == [row for row in rows for _ in range(found[0].numel())]
    assert torch.equal(made.expert("small", "w"), made.base("w"))


def test_a_base_with_the_most_rows_keeps_its_size(tmp_path: Path) -> None:
    made = source(tmp_path, "pad", base=3, small=2)
    assert made.vocabulary_size is None
    assert made.expert("small", "bias").tolist() == [1, 1, 0]
    (tmp_path / "same").mkdir()
    assert source(tmp_path / "same", "pad", base=3, other=3).padded == {}


def test_the_error_names_the_option_if_it_would_help(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"embed is \[5, 2\] in the expert and \[3, 2\] .*suite.vocabulary=pad"):
        source(tmp_path, "same", **{"base": 3, "large": 5})
    base, wide = model(tmp_path / "a", 3, 0.0), model(tmp_path / "b", 5, 0.0, width=4)
    names = {"embed": "embed"}
    with pytest.raises(ModelError, match=r"embed is \[5, 4\] in the expert and \[3, 2\] in the base; give an expert"):
        MergeSource(NamedTensors(base, names), {"x": NamedTensors(wide, names)}, "pad")


def test_a_suite_allows_only_the_two_policies() -> None:
    with pytest.raises(ConfigError, match="suite.vocabulary must be one of same, pad, got 'grow'"):
        Suite("x", "bert", "base", {}, vocabulary="grow")


def test_the_checkpoint_has_the_largest_vocabulary(bert_hub: Path, tmp_path: Path) -> None:
    """The second expert has two more tokens than the base and the first."""
    hub = tmp_path / "hub"
    suite = OmegaConf.to_container(OmegaConf.load(bert_hub / "configs/suite/mini.yaml"))
    assert isinstance(suite, dict)
    config = BertConfig.from_pretrained(bert_hub / "base")
    base, size = BertModel.from_pretrained(bert_hub / "base"), config.vocab_size + 2
    expert = BertForSequenceClassification.from_pretrained(bert_hub / TASKS[1])
    expert.resize_token_embeddings(size, mean_resizing=False)
    expert.save_pretrained(tmp_path / "expert")
    suite["tasks"][TASKS[1]]["expert"] = str(tmp_path / "expert")
    write_suite(hub, {**suite, "vocabulary": "pad"})
    checkpoint = run_in(tmp_path / "run", hub, "merge=average", "quant=none", "guidance=merged", "eval.samples=4")
    merged = AutoModel.from_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["vocab_size"] == size
    rows, old = merged.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight
    assert rows.shape == (size, old.shape[1])
    torch.testing.assert_close(rows[-2:], expert.bert.embeddings.word_embeddings.weight[-2:])
