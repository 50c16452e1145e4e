"""Oracle: what the README asks of models and data. Each case is a miniature suite with one thing wrong in its files; a
run ends in the sentence beside it and leaves nothing, or goes through where the README says that it may."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_cli.errors import DataError, EpmqError, ModelError
from tests import counts, edited
from tests.conftest import TASKS
from tests.hubs import run_in
from tests.minihub import build

Change = Callable[[Path], Any]


def tensors(model: str, change: Callable[[Tensor], Tensor], part: str = "") -> Change:
    """Replaces the tensors of a model whose names have this part."""

    def edit(found: dict[str, Tensor]) -> None:
        found.update({name: change(tensor) for name, tensor in found.items() if part in name})

    return lambda hub: edited.edit_tensors(hub / model, edit)


def settings(model: str, **values: Any) -> Change:
    """Changes a model's config.json."""

    def edit(hub: Path) -> None:
        path = hub / model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def part_settings(model: str, part: str, **values: Any) -> Change:
    """Changes a part of a model's config.json, such as text_config."""

    def edit(hub: Path) -> None:
        path = hub / model / "config.json"
        config = json.loads(path.read_text())
        config[part] |= values
        path.write_text(json.dumps(config))

    return edit


def without(part: str, *models: str) -> Change:
    """Takes the tensors whose names have this part out of models."""

    def edit(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if part in name]:
            del found[name]

    return lambda hub: [edited.edit_tensors(hub / model, edit) for model in models]


def file(path: str, content: str | bytes | None) -> Change:
    """Gives a file this content, or removes it."""

    def edit(hub: Path) -> None:
        if content is None:
            (hub / path).unlink()
        else:
            (hub / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def arrays(**changes: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Changes arrays of the first task's pictures."""

    def edit(hub: Path) -> None:
        found = dict(np.load(hub / "first.npz"))
        np.savez(hub / "first.npz", **(found | {name: change(found[name]) for name, change in changes.items()}))

    return edit


def rows(split: str, text: str | bytes) -> Change:
    return file(f"first_{split}.tsv", text)


def with_one(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda labels: np.concatenate([labels[:-1], [value]])


D, M = DataError, ModelError
HEADS = "expert of task first: classifier"
BAD: dict[str, tuple[str, Change, type[EpmqError], str]] = {
    "no rows to calibrate on": ("bert", rows("train", "label\ttext\n"), D, "task first has no training samples"),
    "an empty file": ("bert", rows("train", ""), D, "task first has no training samples"),
    "no rows to score on": ("bert", rows("test", "label\ttext\n"), D, "task first has no test samples"),
    "a label below 0": ("bert", rows("test", "label\ttext\n-1\tred\n"), D, "labels must lie in 0..2 as its head"),
    "a label beyond": ("bert", rows("test", "label\ttext\n7\tred\n"), D, "has 3 classes, got 7..7"),
    "a label of 30 digits": ("bert", rows("test", f"label\ttext\n{'9' * 30}\tred\n"), D, "labels must be whole"),
    "a label with a fraction": ("bert", rows("test", "label\ttext\n0.5\tred\n"), D, "labels must be whole numbers"),
    "no label": ("bert", rows("test", "label\ttext\n\tred\n"), D, "labels must be whole numbers from 0"),
    "no column of labels": ("bert", rows("test", "text\tx\nred\t1\n"), D, "row 1: no value in column label"),
    "no column of texts": ("bert", rows("train", "label\tx\n1\t1\n"), D, "row 1: no value in column text"),
    "no UTF-8": ("bert", rows("test", b"label\ttext\n1\t\xff\n"), D, "cannot be read as tsv in UTF-8"),
    "no file": ("bert", file("first_test.tsv", None), D, "first_test.tsv is not a file"),
    "no pictures to calibrate on": (
        "clip", arrays(train_images=lambda a: a[:0], train_labels=lambda a: a[:0]), D, "no training samples",
    ),
    "no pictures to score on": (
        "clip", arrays(test_images=lambda a: a[:0], test_labels=lambda a: a[:0]), D, "no test samples",
    ),
    "labels below 0": ("clip", arrays(test_labels=with_one(-1)), D, "has 3 classes, got -1..2"),
    "labels beyond": ("clip", arrays(test_labels=with_one(9)), D, "has 3 classes, got 0..9"),
    "labels with fractions": ("clip", arrays(test_labels=lambda a: a + 0.5), D, "labels float64 (30,)"),
    "labels in words": ("clip", arrays(test_labels=lambda a: a.astype(str)), D, "whole numbers, got uint8"),
    "labels that are NaN": ("clip", arrays(test_labels=lambda a: a * np.nan), D, "labels float64 (30,)"),
    "pictures without a pixel": ("clip", arrays(train_images=lambda a: a[:, :0]), D, "got uint8 (40, 0, 16, 3)"),
    "answers beyond the classes": ("t5", rows("test", "label\ttext\n9\tred\n"), D, "in 0..2 as there are 3 classes"),
    "no text": ("llama", file("first_train.jsonl", ""), D, "at least max_length=12 tokens of text, got 1"),
    "too little text": ("llama", file("first_train.jsonl", '{"text": "red"}\n'), D, "tokens of text, got 2"),
    "a single token": ("llama", file("first_test.jsonl", '{"text": ""}\n'), D, "at least two tokens of text, got 1"),
    "no column of text": ("llama", file("first_test.jsonl", '{"txt": "red"}\n'), D, "no value in column text"),
    "an expert of integers": (
        "clip", tensors("first", lambda t: (100 * t).char()), M, "is of type I8 in the expert and F32 in",
    ),
    "an expert of 8 bits": (
        "clip", tensors("first", lambda t: t.to(torch.float8_e4m3fn)), M, "is of type F8_E4M3 in the expert",
    ),
    "a base of 8 bits": (
        "clip", tensors("base", lambda t: t.to(torch.float8_e4m3fn)), M, "is of type F8_E4M3, merged are F64, ",
    ),
    "a base of integers": ("clip", tensors("base", lambda t: (100 * t).char()), M, "is of type I8, merged are"),
    "an expert of other shapes": (
        "bert", tensors("first", lambda t: t[:-1], "word_emb"), M, "is [17, 32] in the expert and [18, 32] in",
    ),
    "a head for other features": (
        "bert", tensors("first", lambda t: t[:, :16], "classifier.weight"), M,
        f"{HEADS}.weight must have the shape [3, 32] to read what the base gives, got [3, 16]",
    ),
    "a bias for another head": (
        "bert", tensors("first", lambda t: t[:2], "classifier.bias"), M, f"{HEADS}.bias must have the shape [3]",
    ),
    "a config of fewer blocks": (
        "bert", settings("base", num_hidden_layers=1), M, "describes a model without encoder.layer.1.",
    ),
    "a config of no blocks": (
        "bert", settings("base", num_hidden_layers=-1), M, "describes a model without encoder.layer.0.",
    ),
    "a config of more blocks": (
        "bert", settings("base", num_hidden_layers=3), M, "describes a model with encoder.layer.2.",
    ),
    "no projection of texts": (
        "clip", without("text_projection", "base"), M, "describes a model with text_projection.weight, which its files",
    ),
    "no projection of pictures": (
        "clip", without("visual_projection", "base"), M, "describes a model with visual_projection.weight, which",
    ),
    "no table of tokens": (
        "clip", without("token_embedding", "base"), M, "a model with text_model.embeddings.token_embedding.weight,",
    ),
    "a text tower of more blocks": (
        "clip", part_settings("base", "text_config", num_hidden_layers=3), M, "with text_model.encoder.layers.2",
    ),
    "a text tower of fewer blocks": (
        "clip", part_settings("base", "text_config", num_hidden_layers=1), M,
        "a model without text_model.encoder.layers.1.",
    ),
    "no text tower": (
        "clip", without("text_model", "base"), M, "describes a model with text_model.",
    ),
    "no output layer": ("llama", without("lm_head", *edited.MODELS), M, "a model with lm_head.weight, which its files"),
    "no last norm": ("llama", without("model.norm", *edited.MODELS), M, "a model with model.norm.weight, which its"),
    "no embeddings anywhere": (
        "bert", without("word_embeddings", *edited.MODELS), M, "a model with embeddings.word_embeddings.weight, which",
    ),
    "no classifier's pooler": ("bert", without("pooler", *edited.MODELS), M, "has no pooler, which"),
    "no decoder's last norm": (
        "t5", without("decoder.final_layer_norm", *edited.MODELS), M, "with decoder.final_layer_norm.weight, which its",
    ),
    "a config of another vocabulary": ("bert", settings("base", vocab_size=3), M, "cannot be read by AutoModel"),
    "a width in words": ("bert", settings("base", hidden_size="wide"), M, "cannot be read by AutoConfig"),
    "no width": ("bert", settings("first", hidden_size=None), M, "cannot be read by AutoConfig"),
    "another activation": ("bert", settings("base", hidden_act="nope"), M, "hidden_act is gelu in its config and"),
    "no tokenizer": ("clip", file("base/tokenizer.json", None), M, "cannot be read by AutoTokenizer"),
    "a tokenizer that is none": ("clip", file("base/tokenizer.json", "{}"), M, "cannot be read by AutoTokenizer"),
    "no processor": ("clip", file("base/preprocessor_config.json", None), M, "read by AutoImageProcessor"),
    "half a processor": ("clip", file("base/preprocessor_config.json", "{"), M, "read by AutoImageProcessor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, clip_hub: Path, bert_hub: Path) -> dict[str, Path]:
    made = {kind: build(tmp_path_factory.mktemp(kind), kind) for kind in ("t5", "llama")}
    return {"clip": clip_hub, "bert": bert_hub, **made}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_and_data_end_in_one_sentence(case: str, hubs: dict[str, Path], tmp_path: Path) -> None:
    kind, change, error, message = BAD[case]
    hub = edited.copied(hubs[kind], tmp_path / "hub")
    change(hub)
    with pytest.raises(error) as raised:
        run_in(tmp_path / "run", hub, "eval.samples=30")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not {"checkpoint", "metrics.json"} & {path.name for path in (tmp_path / "run").iterdir()}
    counts.TRIED[counts.BAD] += 1


def every_expert_is_the_base(hub: Path) -> None:
    for task in TASKS:
        shutil.copyfile(hub / "base" / "model.safetensors", hub / task / "model.safetensors")
        shutil.copyfile(hub / "base" / "config.json", hub / task / "config.json")


FINE: dict[str, tuple[str, tuple[str, ...], Change]] = {
    "experts of float64": ("clip", (), tensors("first", Tensor.double)),
    "a base of float64": ("clip", (), tensors("base", Tensor.double)),
    "experts that are the base": ("clip", (), every_expert_is_the_base),
    "experts that are the base, TIES": ("clip", ("merge=ties",), every_expert_is_the_base),
    "one class only": ("clip", (), arrays(test_labels=lambda a: 0 * a, train_labels=lambda a: 0 * a)),
    "a class without samples": ("clip", (), arrays(test_labels=lambda a: np.minimum(a, 1))),
    "labels beyond in what is not scored": ("clip", (), arrays(train_labels=with_one(99))),
    "pictures of a pixel": ("clip", (), arrays(train_images=lambda a: a[:, :1, :1])),
    "one class, Matthews' correlation": (
        "bert", ("+suite.tasks.first.metric=matthews",), rows("test", "label\ttext\n0\tred\n0\tblue\n"),
    ),
    "one label, Spearman's correlation": (
        "bert", ("+suite.tasks.first.metric=spearman",), rows("test", "label\ttext\n0\tred\n0\tblue\n"),
    ),
    "texts of one token": ("bert", ("suite.tasks.first.max_length=1",), lambda hub: None),
    "texts of nothing but their ends": ("bert", ("suite.tasks.first.max_length=2",), lambda hub: None),
    "prompts of one token": ("t5", ("suite.tasks.first.max_length=1",), lambda hub: None),
    "one sample": ("clip", ("calib.samples=1",), lambda hub: None),
    "samples one by one": ("clip", ("calib.batch_size=1", "eval.batch_size=1"), lambda hub: None),
    "text that is a number": ("llama", (), file("first_train.jsonl", '{"text": 3}\n' * 30)),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_what_is_odd_but_allowed_goes_through(case: str, hubs: dict[str, Path], tmp_path: Path) -> None:
    kind, options, change = FINE[case]
    hub = edited.copied(hubs[kind], tmp_path / "hub")
    change(hub)
    checkpoint = run_in(tmp_path / "run", hub, "eval.samples=6", *options)
    assert edited.all_finite(checkpoint)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["events"]["fallbacks"] == 0
