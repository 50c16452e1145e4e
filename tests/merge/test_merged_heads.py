"""Oracle: the expert's own classifier in transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from tests.conftest import drifted
from tests.end_to_end.test_lone import ENCODER, settings_of
from tests.helpers.lone import assert_same, merged_folder, store, suite_of

NAMES = {"id2label": {0: "bad", 1: "good", 2: "fair"}, "label2id": {"bad": 0, "good": 1, "fair": 2}}
OTHERS = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
IDS = {"input_ids": torch.tensor([[1, 5, 6, 7]])}


def classifier(seed: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    made = drifted(t.BertForSequenceClassification(t.BertConfig(**ENCODER, num_labels=3)).eval(), seed)
    made.config.update(fields)
    return made


def merged(folder: Path, base: Any, **experts: Any) -> Path:
    paths = {name: store(expert, folder / name) for name, expert in experts.items()}
    return merged_folder(folder / "made", suite_of("bert", store(base, folder / "base"), paths))


@pytest.mark.parametrize("names", [{}, NAMES])
def test_a_lone_classifier_of_a_base_with_a_head_is_reproduced(names: dict[str, Any], tmp_path: Path) -> None:
    """Including head and class names, whether or not the base names its classes."""
    made = merged(tmp_path, classifier(1), x=classifier(2, **names))
    found, wanted = (t.BertForSequenceClassification.from_pretrained(path) for path in (made, tmp_path / "x"))
    assert_same(found, wanted, IDS)
    assert found.config.id2label == wanted.config.id2label
    assert found.config.label2id == wanted.config.label2id


@pytest.mark.parametrize("kind", ["another number", "other names", "no head"])
def test_the_bases_head_is_left_out_if_experts_have_other_classes(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is the expert's encoder, with a class that has no head."""
    caplog.set_level(logging.WARNING, "epmq")
    expert = classifier(2, **(OTHERS if kind == "other names" else {}))
    if kind == "another number":
        expert = drifted(t.BertForSequenceClassification(t.BertConfig(**ENCODER, num_labels=2)).eval(), 2)
    made = merged(tmp_path, classifier(1, **NAMES), x=expert.bert if kind == "no head" else expert)
    assert not any("classifier" in name for name in load_file(made / "model.safetensors"))
    assert settings_of(made)["architectures"] == ["BertModel"]
    assert "base: its task head (classifier.bias, classifier.weight) is left out" in caplog.text
    assert_same(t.AutoModel.from_pretrained(made), t.AutoModel.from_pretrained(tmp_path / "x"))


def test_experts_for_different_classes_do_not_share_a_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The mean of heads for different classes has no meaning."""
    caplog.set_level(logging.WARNING, "epmq")
    made = merged(tmp_path, classifier(1), a=classifier(2, **NAMES), b=classifier(3, **OTHERS))
    assert "the experts' heads are for different classes" in caplog.text
    assert json.loads((made / "config.json").read_text())["architectures"] == ["BertModel"]
