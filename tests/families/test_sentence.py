"""Oracles: pooling written out text by text, forward passes of transformers, and the numbers of a lone expert.
tests/engines compares with sentence-transformers itself."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Suite, Task
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, suite_family
from epmq_cli.families.family import Family, load_model
from epmq_cli.families.structure import pooled
from epmq_cli.families.tasks.embedding import Embedding
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.reload import ready
from tests.helpers.hubs import config, lone_expert, run_in
from tests.helpers.sentences import PROMPTS, sentence_hub, write, write_sentences
from tests.helpers.tiers import first

CPU = torch.device("cpu")
TEXTS = ["red blue", "green film is very good a photo of", "bad"]
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"pooling": "mean", "old": True},
    "mpnet": {"pooling": "max", "inside": "0_Transformer", "dense": True},
    "roberta": {"pooling": "cls"},
    "distilbert": {"pooling": "mean_sqrt_len_tokens"},
    "modernbert": {"pooling": "weightedmean", "dense": True},
    "electra": {"pooling": "lasttoken"},
    "deberta": {"pooling": "mean"},
}
"""Encoders with the layouts of their folders."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The hub of a kind, built on first use."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = sentence_hub(tmp_path_factory.mktemp(kind), kind, **KINDS[kind])
        return made[kind]

    return get


def wanted_pooling(rows: Tensor, kind: str) -> Tensor:
    """The pooled rows (width,) of the real tokens (tokens, width) of a text."""
    places = torch.arange(1.0, 1 + len(rows))[:, None]
    return {
        "cls": lambda: rows[0],
        "mean": lambda: rows.mean(0),
        "max": lambda: rows.max(0).values,
        "mean_sqrt_len_tokens": lambda: rows.sum(0) / math.sqrt(len(rows)),
        "weightedmean": lambda: (places * rows).sum(0) / places.sum(),
        "lasttoken": lambda: rows[-1],
    }[kind]()


@pytest.mark.parametrize("kind", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_pooling_reads_the_real_tokens_of_each_text(kind: Any) -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = [5, 2, 1]
    mask = torch.tensor([[place < length for place in range(5)] for length in lengths])
    found = pooled(hidden, 0 if kind == "cls" else kind, mask)
    for row, text, length in zip(found, hidden, lengths, strict=True):
        torch.testing.assert_close(row, wanted_pooling(text[:length], kind).to(row.dtype), rtol=1e-6, atol=1e-7)
    whole = pooled(hidden, 0 if kind == "cls" else kind, None)
    torch.testing.assert_close(whole[0], found[0])


def task_of(metric: str = "spearman") -> Task:
    data: Any = None
    return Task("t", "unread", data, metric=metric, max_length=64)


def embedded(family: Family, folder: Path, texts: list[Any]) -> Tensor:
    """The embeddings of texts, with the usual prompt."""
    tasks, task = family.tasks, task_of()
    assert isinstance(tasks, Embedding)
    batch = family.collate(folder, task)(list(tasks.worded(task, Samples(texts)).inputs))
    with torch.inference_mode():
        return tasks.embeddings(family.features(load_model(family, folder, CPU), batch))


def family_of(folder: Path) -> Family:
    """The family of a hub's suite."""
    return steps_job(folder).family


def steps_job(folder: Path, *options: str) -> Any:
    from epmq_cli.pipeline.job import make_job

    return make_job(config(folder, *options))


@pytest.mark.parametrize("kind", first(2, KINDS))
def test_embeddings_are_those_of_the_transformer_and_the_layers_behind_it(kind: str, hub: Any) -> None:
    folder, layout = hub(kind) / "base", KINDS[kind]
    place = folder / layout.get("inside", "")
    found, model = embedded(family_of(hub(kind)), place, TEXTS), AutoModel.from_pretrained(place).eval()
    words = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
    dense = load_file(folder / "2_Dense" / "model.safetensors") if layout.get("dense") else {}
    for row, text in zip(found, TEXTS, strict=True):
        ids = [words[word] for word in ("<s>", *f"{PROMPTS['usual']}{text}".split())][:12]
        with torch.inference_mode():
            wanted = wanted_pooling(model(input_ids=torch.tensor([ids])).last_hidden_state[0], layout["pooling"])
        if dense:
            wanted = torch.tanh(dense["linear.weight"] @ wanted + dense["linear.bias"])
        torch.testing.assert_close(row, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", first(1, KINDS))
def test_a_lone_expert_is_reproduced(kind: str, hub: Any) -> None:
    far, found, wanted = lone_expert(hub(kind), "guidance.readout_weight=1", "calib.samples=60")
    assert len(wanted) > 40  # both texts of each pair
    error = (found - wanted).square().sum() / (far - wanted).square().sum()
    assert error < 0.05


@pytest.mark.parametrize("kind", first(2, KINDS))
def test_a_checkpoint_is_a_folder_of_its_kind_and_scores_as_the_run_did(kind: str, hub: Any, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, hub(kind), "guidance=feature", "bits=4")
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"} < files
    assert ("2_Dense/model.safetensors" in files) is KINDS[kind].get("dense", False)
    assert json.loads((checkpoint / "modules.json").read_text())[0]["path"] == ""
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    job = steps_job(hub(kind))
    family, model, tasks = ready(checkpoint, job.suite, job.evaluation, CPU)
    assert family.name == "sentence_transformers"
    from epmq_cli.evaluate.score import Scorer

    scores = Scorer(job.evaluation, family, CPU).scores(model, tasks, "quantized", checkpoint)["quantized"]
    recorded = metrics["scores"]["tasks"]
    assert {name: score.value for name, score in scores.items()} == {n: own["quantized"] for n, own in recorded.items()}
    for own in metrics["agreement"].values():
        assert own["merged"].keys() == own["quantized"].keys() == {"cosine"}
        assert 0.5 < own["quantized"]["cosine"] <= 1


@pytest.mark.slow
def test_distillation_brings_embeddings_nearer_to_the_experts(hub: Any, tmp_path: Path) -> None:
    options = ["refine=distill", "refine.epochs=4", "refine.lr=0.002", "quant=none", "merge=average", "guidance=merged"]
    run_in(tmp_path, hub("bert"), *options, "eval.stages=[merged]")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    means = {stage: sum(own[stage]["cosine"] for own in metrics["agreement"].values()) for stage in STAGES}
    assert means["quantized"] > means["merged"]


STAGES = ("merged", "quantized")


def test_calibration_reads_each_text_of_pairs_once_with_its_prompt(hub: Any) -> None:
    tasks = family_of(hub("bert")).tasks
    samples = Samples([("red", "blue"), ("red", "green"), ("", "film"), ("a", "b")])
    found = tasks.calibrating(task_of("recall@1"), samples, 4).inputs
    assert list(found) == ["good red", "bad blue", "bad green", "bad film"]
    assert list(tasks.calibrating(task_of(), samples, 2).inputs) == ["it red", "it blue"]
    assert list(tasks.worded(task_of(), Samples(["red"])).inputs) == ["it red"]


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_of_pairs_are_the_diagonal_of_all(kind: str, hub: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hub("bert") / "base", tmp_path / "base")
    write(folder / "config_sentence_transformers.json", {"similarity_fn_name": kind})
    suite = Suite("s", "sentence_transformers", str(folder), {"t": {"expert": str(folder), "data": Unread()}})
    family = suite_family(suite)
    model, task = load_model(family, folder, CPU), task_of()
    pairs = [("red", "blue"), ("green film", "a photo"), ("bad", "bad")]
    with torch.inference_mode():
        predict, batch = family.predict(folder, task), family.collate(folder, task)
        found = predict(model, batch(pairs), {})
        one, other = (predict(model, batch([pair[side] for pair in pairs]), {}) for side in (0, 1))
    norms = {"cosine": (one * other).sum(-1), "dot": (one * other).sum(-1)}
    norms |= {"euclidean": -(one - other).norm(dim=-1), "manhattan": -(one - other).abs().sum(-1)}
    torch.testing.assert_close(found, norms[kind], rtol=1e-4, atol=2e-3)


class Unread:
    """A source that no test reads."""

    def load(self, split: Any, count: Any = None, seed: Any = None) -> Samples:
        raise AssertionError


def suite(base: Path, expert: Path, family: str = "auto") -> Suite:
    return Suite("s", family, str(base), {"t": {"expert": str(expert), "data": Unread(), "metric": "pearson"}})


def test_experts_decide_whether_sentences_are_embedded(hub: Any, bert_hub: Path) -> None:
    own = hub("bert")
    assert suite_family(suite(own / "base", own / "first")).name == "sentence_transformers"
    assert suite_family(suite(bert_hub / "base", own / "first")).name == "sentence_transformers"
    assert suite_family(suite(own / "base", bert_hub / "first")) is FAMILIES["bert"]
    assert suite_family(suite(own / "base", bert_hub / "first", "sentence_transformers")).heads == "none"
    with pytest.raises(ModelError, match=r"needs folders of sentence-transformers, which have a modules.json"):
        suite_family(suite(bert_hub / "base", bert_hub / "first", "sentence_transformers"))


def test_models_that_embed_in_another_way_are_refused(hub: Any, tmp_path: Path) -> None:
    base = hub("modernbert")
    cls = {"pooling_mode": "cls"}
    for name, change, message in (
        (
            "pooled",
            lambda f: write(f / "1_Pooling" / "config.json", cls),
            "pools by cls, and base by",
        ),
        ("trained", trained_dense, r"has trained its Dense layer \(2_Dense\).* epmq merges the transformer only"),
        ("bare", lambda f: shutil.rmtree(f / "2_Dense"), "2_Dense has no config.json"),
    ):
        expert = shutil.copytree(base / "first", tmp_path / name)
        change(expert)
        with pytest.raises(ModelError, match=message) as raised:
            own = suite(base / "base", expert)
            SuiteModels(own, suite_family(own))
        assert "\n" not in str(raised.value)


def trained_dense(folder: Path) -> None:
    path = folder / "2_Dense" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def test_a_transformer_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    from tests.helpers.minihub import IDS, SIZE

    folder = write_sentences(tmp_path / "llama", LlamaModel(LlamaConfig(**SIZE, **IDS)), "lasttoken")
    with pytest.raises(ModelError, match=r"a transformer of family causal_lm; epmq takes text encoders"):
        suite_family(suite(folder, folder, "sentence_transformers"))
