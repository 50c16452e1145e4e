"""Oracle: the README's requirements on models and data. Each case is a miniature suite with one error in its files;
the run is refused with the sentence of the case and writes nothing, or it completes if the README allows the case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError, DataError, EpmqError, ModelError
from tests.conftest import TASKS
from tests.helpers import counts, edited
from tests.helpers.changes import (
    GENERATION,
    PIXELS,
    TOKENS,
    Change,
    arrays,
    both_settings,
    content,
    entry,
    file,
    no_tokenizer,
    other_ids,
    part_settings,
    rows,
    settings,
    tensors,
    with_one,
    without,
)
from tests.helpers.hubs import run_in
from tests.helpers.minihub import build
from tests.helpers.tiers import every

D, M = DataError, ModelError


def conversations(hub: Path) -> None:
    """The first task is scored on conversations."""
    path = hub / "first_test.jsonl"
    path.write_text('{"text": [{"role": "user", "content": "red"}], "label": 1}\n')
    entry(data={"test": str(path)})(hub)


HEADS = "expert of task first: classifier"
BAD: dict[str, tuple[str, Change, type[EpmqError], str]] = {
    "no rows to calibrate on": ("bert", rows("train", "label\ttext\n"), D, "task first has no training samples"),
    "an empty file": ("bert", rows("train", ""), D, "task first has no training samples"),
    "no rows to score on": ("bert", rows("test", "label\ttext\n"), D, "task first has no test samples"),
    "a label below 0": ("bert", rows("test", "label\ttext\n-1\ta\n0\ta\n"), D, "labels must lie in 0..2 as its head"),
    "no labels but -1": ("bert", rows("test", "label\ttext\n-1\tred\n"), D, "have no labels, all are -1"),
    "a label beyond": ("bert", rows("test", "label\ttext\n7\tred\n"), D, "has 3 classes, got 7..7"),
    "a label of 30 digits": ("bert", rows("test", f"label\ttext\n{'9' * 30}\tred\n"), D, "labels must be whole"),
    "a label with a fraction": ("bert", rows("test", "label\ttext\n0.5\tred\n"), D, "labels must be whole numbers"),
    "no label": ("bert", rows("test", "label\ttext\n\tred\n"), D, "row 1: the row has no label"),
    "no column of labels": ("bert", rows("test", "text\tx\nred\t1\n"), D, "has no column label (data.label)"),
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
    "text that is a number": (
        "llama", file("first_train.jsonl", '{"text": 3}\n' * 30), D, "row 1: column text holds a number (3), not text",
    ),
    "conversations without a template": (
        "llama", file("first_test.jsonl", '{"text": [{"role": "user", "content": "red"}]}\n'), D,
        "row 1 holds a conversation, and the tokenizer in",
    ),
    "conversations for a classifier": (
        "bert", conversations, D, "row 1 holds conversations, and family bert reads texts or pairs of texts; choose",
    ),
    "sequences longer than the positions": (
        "llama", entry(max_length=65), ConfigError, "max_length must be at most 64, the positions of the model in",
    ),
    "prompts longer than the text tower": (
        "clip", entry(templates=["a photo of " * 40 + "a {}"]), ConfigError,
        "tokens, and the text tower of the base reads at most",
    ),
    "a single token": ("llama", file("first_test.jsonl", '{"text": ""}\n'), D, "at least two tokens of text, got 1"),
    "no column of text": ("llama", file("first_test.jsonl", '{"txt": "red"}\n'), D, "has the columns txt"),
    "an expert of integers": (
        "clip", tensors("first", lambda t: (100 * t).char()), M, "is of type I8 in the expert and F32 in",
    ),
    "an expert of 8 bits": (
        "clip", tensors("first", lambda t: t.to(torch.float8_e4m3fn)), M, "is of type F8_E4M3 in the expert",
    ),
    "a base of 8 bits": (
        "clip", tensors("base", lambda t: t.to(torch.float8_e4m3fn)), M, "is of type F8_E4M3, and epmq merges F64, ",
    ),
    "a base of integers": ("clip", tensors("base", lambda t: (100 * t).char()), M, "is of type I8, and epmq merges"),
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
    "no output layer": ("llama", without("lm_head", *edited.MODELS), M, "has no lm_head.weight, which its config"),
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
    "no tokenizer": ("clip", file("base/tokenizer.json", None), M, "does not load in transformers"),
    "no vocabulary of BERT": ("bert", no_tokenizer, M, "has no vocabulary, such as a tokenizer.json"),
    "no vocabulary of T5": ("t5", no_tokenizer, M, "has no vocabulary, such as a tokenizer.json or a vocab.txt"),
    "no vocabulary of CLIP": ("clip", no_tokenizer, M, "has no vocabulary, such as a tokenizer.json"),
    "tokens without rows, BERT": ("bert", other_ids, M, "and the model beside it has 18 tokens; fetch both again"),
    "tokens without rows, CLIP": ("clip", other_ids, M, "and the model beside it has 17 tokens; fetch both again"),
    "tokens without rows, T5": ("t5", other_ids, M, "and the model beside it has 24 tokens; fetch both again"),
    "tokens without rows, Llama": ("llama", other_ids, M, "and the model beside it has 24 tokens; fetch both again"),
    "a length in words": (
        "clip", content(f"base/{TOKENS}", model_max_length="x"), M, "has a model_max_length of 'x', which must be a",
    ),
    "no end of texts": (
        "clip", part_settings("base", "text_config", eos_token_id=None), M, "a text_config.eos_token_id of null, the",
    ),
    "another end of texts": (
        "clip", part_settings("base", "text_config", eos_token_id=99), M, "a text_config.eos_token_id of 99, the",
    ),
    "no start of answers": (
        "t5", both_settings(decoder_start_token_id=None), M, "has a decoder_start_token_id of null, which must be one",
    ),
    "a start of answers beyond": (
        "t5", both_settings(decoder_start_token_id=99), M, "has a decoder_start_token_id of 99, which must be one of",
    ),
    "no end of answers": ("t5", both_settings(eos_token_id=None), M, "has a eos_token_id of null, which must be one"),
    "odd answers": ("t5", content(f"base/{GENERATION}", repetition_penalty=-1.0), M, "base cannot generate answers"),
    "smaller pictures": (
        "clip", content(f"base/{PIXELS}", crop_size={"height": 8, "width": 8}), M,
        "makes images of [3, 8, 8], and the model beside it reads [3, 16, 16]; set its size",
    ),
    "smaller pictures of ViT": (
        "vit", content(f"base/{PIXELS}", size={"height": 8, "width": 8}), M, "makes images of [3, 8, 8], and the",
    ),
    "pictures of nothing": (
        "clip", content(f"base/{PIXELS}", size={"shortest_edge": 0}), M, "fails on an image (",
    ),
    "two means": ("clip", content(f"base/{PIXELS}", image_mean=[0.5, 0.5]), M, "fails on an image ("),
    "a deviation of 0": ("clip", content(f"base/{PIXELS}", image_std=[0, 0, 0]), M, "preprocessor_config.json "),
    "no such resampling": ("clip", content(f"base/{PIXELS}", resample=99), M, "fails on an image ("),
    "a tokenizer that is none": ("clip", file("base/tokenizer.json", "{}"), M, "does not load in transformers"),
    "no processor": ("clip", file("base/preprocessor_config.json", None), M, "read by AutoImageProcessor"),
    "half a processor": ("clip", file("base/preprocessor_config.json", "{"), M, "read by AutoImageProcessor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, clip_hub: Path, bert_hub: Path) -> dict[str, Path]:
    made = {kind: build(tmp_path_factory.mktemp(kind), kind) for kind in ("t5", "llama", "vit")}
    return {"clip": clip_hub, "bert": bert_hub, **made}


@pytest.mark.parametrize("case", every(3, BAD))
def test_bad_models_and_data_are_refused_in_one_sentence(case: str, hubs: dict[str, Path], tmp_path: Path) -> None:
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


def chats(hub: Path) -> None:
    """The first task has conversations, and the base has a chat template."""
    template = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
    (hub / "base" / "chat_template.jinja").write_text(template)
    for split in ("train", "test"):
        path = hub / f"first_{split}.jsonl"
        lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        messages = [[{"from": "human", "value": line}, {"from": "gpt", "value": line}] for line in lines]
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in messages))


FINE: dict[str, tuple[str, tuple[str, ...], Change]] = {
    "experts of float64": ("clip", (), tensors("first", Tensor.double)),
    "a base of float64": ("clip", (), tensors("base", Tensor.double)),
    "experts that are the base": ("clip", (), every_expert_is_the_base),
    "experts that are the base, TIES": ("clip", ("merge=ties",), every_expert_is_the_base),
    "one class only": ("clip", (), arrays(test_labels=lambda a: 0 * a, train_labels=lambda a: 0 * a)),
    "a class without samples": ("clip", (), arrays(test_labels=lambda a: np.minimum(a, 1))),
    "labels beyond in what is not scored": ("clip", (), arrays(train_labels=with_one(99))),
    "pictures of a pixel": ("clip", (), arrays(train_images=lambda a: a[:, :1, :1])),
    "texts of one token": ("bert", ("suite.tasks.first.max_length=1",), lambda hub: None),
    "texts of nothing but their ends": ("bert", ("suite.tasks.first.max_length=2",), lambda hub: None),
    "prompts of one token": ("t5", ("suite.tasks.first.max_length=1",), lambda hub: None),
    "one sample": ("clip", ("calib.samples=1",), lambda hub: None),
    "conversations with a template": ("llama", (), chats),
    "samples one by one": ("clip", ("calib.batch_size=1", "eval.batch_size=1"), lambda hub: None),
}  # fmt: skip


@pytest.mark.parametrize("case", every(3, FINE))
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_unusual_but_valid_inputs_are_accepted(case: str, hubs: dict[str, Path], tmp_path: Path) -> None:
    kind, options, change = FINE[case]
    hub = edited.copied(hubs[kind], tmp_path / "hub")
    change(hub)
    checkpoint = run_in(tmp_path / "run", hub, "eval.samples=6", *options)
    assert edited.all_finite(checkpoint)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["events"]["fallbacks"] == 0
