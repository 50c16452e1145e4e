"""A miniature hub on disk: random models of the real classes in the real file layout, and data beside them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub is imported: no test may depend on the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only slow down models of a few thousand weights
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that queries CUDA itself for GPUs can no longer fork

import atexit
import copy
import gc
import logging
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.helpers.counts import TRIED
from tests.helpers.gpu import skip_reason
from tests.helpers.outcomes import foreign_line

os.environ["EPMQ_CACHE"] = tempfile.mkdtemp(prefix="epmq-cache-")  # not the developer's cache
atexit.register(shutil.rmtree, os.environ["EPMQ_CACHE"], ignore_errors=True)

WORDS = ["red", "blue", "green", "a", "photo", "of", "good", "bad", "film", "very", "not", "it", "is"]
CLASSES = ["red", "blue", "green"]
TASKS = ("first", "second")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests with the marker gpu on machines without a GPU, before their fixtures run."""
    if item.get_closest_marker("gpu") and (reason := skip_reason()):
        pytest.skip(reason)


@pytest.fixture
def pages() -> None:
    """Makes the runs of a test draw their report.html and the picture of their card."""


@pytest.fixture(autouse=True)
def short_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write a short report.html and a card without a picture, because each drawing takes a tenth of a second."""
    if "pages" not in request.fixturenames:
        monkeypatch.setattr("epmq_cli.report.page.page.run_page", lambda content: "<!doctype html><title>run</title>\n")
        monkeypatch.setattr("epmq_cli.report.page.pictures.score_pictures", lambda scores: {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    before = Counter(TRIED)
    yield
    item.user_properties.append(("tried", dict(TRIED - before)))


def pytest_collection_finish() -> None:
    """Excludes the objects that imports created from all later garbage collections, which become rarer."""
    import matplotlib.backends.backend_svg  # noqa: F401  forked runs, which draw a report, need not import it

    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    found: Counter[str] = sum((Counter(tried) for own in passed for key, tried in own if key == "tried"), Counter())
    for what, count in sorted(found.items()):
        terminalreporter.write_line(f"{count} {what}")
    ended = (terminalreporter.stats.get(outcome, []) for outcome in ("passed", "failed"))
    if line := foreign_line(report for reports in ended for report in reports):
        terminalreporter.write_line(line)


def drifted(model: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A copy of the model with noise on every parameter, in place of fine-tuning; but on those that only it freezes."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad] or copied.parameters()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return copied


def write_suite(folder: Path, suite: dict[str, Any]) -> Path:
    """A config folder with the suite as `suite=mini`."""
    path = folder / "configs" / "suite" / "mini.yaml"
    path.parent.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"_target_": "epmq_cli.data.suite.Suite", "name": "mini", **suite}), path)
    return folder / "configs"


def write_pictures(path: Path, generator: np.random.Generator, train: int, test: int) -> dict[str, str]:
    """Writes an npz of random pictures with labels 0, 1 and 2; returns its entry in a suite."""
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = generator.integers(0, 3, count)
    np.savez(path, **arrays)
    return {"_target_": "epmq_cli.data.images.Npz", "path": str(path)}


@pytest.fixture(scope="session")
def clip_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, first, second (CLIPModel and two CLIPVisionModel in float32), npz data, and
    configs/suite/mini.yaml."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<start>", "<unk>", *WORDS, "<end>"])}
    end = vocabulary["<end>"]  # the last token, as in CLIP's vocabulary: its output is the text embedding
    tokens = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end}
    vision = {**size, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**size, **tokens}, vision_config=vision, projection_dim=32)
    base = CLIPModel(config).eval()
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        drifted(base.vision_model, seed).save_pretrained(folder / task)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "base"
    )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", end)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    tasks = {}
    for task in TASKS:
        data = write_pictures(folder / f"{task}.npz", generator, 40, 30)
        templates = ["a photo of a {}", "a {}"]
        tasks[task] = {"expert": str(folder / task), "data": data, "classes": CLASSES, "templates": templates}
    write_suite(folder, {"family": "clip", "base": str(folder / "base"), "tasks": tasks})
    return folder


@pytest.fixture(scope="session")
def bert_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, first, second (BertModel, two BertForSequenceClassification), tsv and jsonl data,
    configs/suite/mini.yaml."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, num_labels=3, **size)
    base = BertForSequenceClassification(config).eval()
    for seed, task in enumerate(TASKS):
        drifted(base, seed).save_pretrained(folder / task)
    model = BertModel(config)
    model.load_state_dict(base.bert.state_dict())
    model.save_pretrained(folder / "base")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    for task in TASKS:
        for split, count in (("train", 40), ("test", 30)):
            texts = [" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(count)]
            rows = [f"{generator.integers(0, 3)}\t{text}" for text in texts]
            (folder / f"{task}_{split}.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    tasks = {
        task: {
            "expert": str(folder / task),
            "max_length": 16,
            "data": {
                "_target_": "epmq_cli.data.table.Table",
                "train": str(folder / f"{task}_train.tsv"),
                "test": str(folder / f"{task}_test.tsv"),
            },
        }
        for task in TASKS
    }
    write_suite(folder, {"family": "bert", "base": str(folder / "base"), "tasks": tasks})
    return folder


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def epmq(tmp_path: Path) -> Run:
    """Runs the `epmq` command in an empty folder and a separate process, forked from this one to save the imports."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        from tests.faults.driver import run_epmq

        return run_epmq(tmp_path, *arguments, **environment)

    return run


@pytest.fixture
def epmq_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the `epmq` command in an empty folder within the test's process, to save the seconds of importing torch
    and transformers."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        from epmq_cli import cli

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["epmq", *arguments])
        capsys.readouterr()
        status: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code
        finally:
            for handler in [handler for handler in logging.root.handlers if isinstance(handler, logging.FileHandler)]:
                logging.root.removeHandler(handler)
                handler.close()
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run
