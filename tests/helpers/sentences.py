"""Miniature hubs of sentence-transformers: folders as the library writes them, pairs with scores, and queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.conftest import TASKS, WORDS, drifted, write_suite
from tests.helpers.minihub import IDS, SIZE, encoder_models, tokenizer

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
"""The classes of modules in version 6."""
OLD_NAMES = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
PROMPTS = {"query": "good ", "document": "bad ", "usual": "it "}
TABLE = {"_target_": "epmq_cli.data.table.Table"}


def encoder(kind: str) -> Any:
    """A small random encoder with the seed 0; BERT's has a pooler."""
    import transformers as t

    if kind != "bert":
        return encoder_models(kind).base_model
    torch.manual_seed(0)
    return t.BertModel(t.BertConfig(**SIZE, **IDS, max_position_embeddings=40)).eval()


def write_sentences(
    folder: Path, model: Any, pooling: str = "mean", inside: str = "", dense: bool = False, old: bool = False
) -> Path:
    """Writes a model. `inside`: the folder of the transformer. `old`: as before version 6."""
    place = folder / inside
    model.save_pretrained(place)
    tokenizer(place, end=False)
    modules = [("Transformer", inside), ("Pooling", "1_Pooling"), *([("Dense", "2_Dense")] if dense else [])]
    modules.append(("Normalize", f"{len(modules)}_Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": OLD + kind if old else NEW[kind]}
        for i, (kind, path) in enumerate(modules)
    ]
    write(folder / "modules.json", entries)
    flags = {f"pooling_mode_{name}": kind == pooling for kind, name in OLD_NAMES.items()}
    own = {"word_embedding_dimension": 32, **flags} if old else {"embedding_dimension": 32, "pooling_mode": pooling}
    write(folder / "1_Pooling" / "config.json", own)
    write(place / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    settings = {"prompts": PROMPTS, "default_prompt_name": "usual", "similarity_fn_name": "cosine"}
    write(folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", **settings})
    if dense:
        layer = {"in_features": 32, "out_features": 16, "bias": True}
        layer["activation_function"] = "torch.nn.modules.activation.Tanh"
        write(folder / "2_Dense" / "config.json", layer)
        torch.manual_seed(1)
        save_file({"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}, folder / "2_Dense" / WEIGHTS)
    return folder


WEIGHTS = "model.safetensors"


def write(path: Path, content: Any) -> None:
    """Writes JSON, and the folder that it is in."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))


def text(generator: np.random.Generator) -> str:
    """A random text of at most 8 words."""
    return " ".join(generator.choice(WORDS, generator.integers(1, 9)))


def pairs(folder: Path) -> dict[str, Any]:
    """Writes scored pairs, and queries with their documents. Returns the data and the metrics of both tasks."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = [f"{text(generator)}\t{text(generator)}\t{generator.random():.3f}" for _ in range(30)]
        (folder / f"first_{split}.tsv").write_text("\n".join(["one\tother\tscore", *rows]) + "\n")
        lines = [json.dumps({"query": text(generator), "answer": text(generator)}) for _ in range(30)]
        (folder / f"second_{split}.jsonl").write_text("\n".join(lines) + "\n")
    names = {task: {s: str(folder / f"{task}_{s}.{end}") for s in ("train", "test")} for task, end in ENDS.items()}
    scored = {**TABLE, **names["first"], "text": ["one", "other"], "label": "score", "regression": True}
    found = {**TABLE, **names["second"], "text": ["query", "answer"], "label": None}
    return {"first": {"data": scored, "metric": "spearman"}, "second": {"data": found, "metric": "recall@10"}}


ENDS = {"first": "tsv", "second": "jsonl"}


def sentence_hub(folder: Path, kind: str, **layout: Any) -> Path:
    """Writes base, first, second, data and suite. `layout`: see `write_sentences`."""
    base = encoder(kind)
    write_sentences(folder / "base", base, **layout)
    for seed, task in enumerate(TASKS):
        write_sentences(folder / task, drifted(base, seed), **layout)
    tasks = {task: {"expert": str(folder / task), "max_length": 16, **own} for task, own in pairs(folder).items()}
    write_suite(folder, {"family": "auto", "base": str(folder / "base"), "tasks": tasks})
    return folder
