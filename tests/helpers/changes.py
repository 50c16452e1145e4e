"""Changes that break one thing in the files of a miniature hub: models, their settings and tokenizers, data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from tests.conftest import TASKS, WORDS
from tests.helpers import edited

Change = Callable[[Path], Any]
TOKENS, PIXELS, GENERATION = "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"


def tensors(model: str, change: Callable[[Tensor], Tensor], part: str = "") -> Change:
    """Replaces the tensors of a model whose names contain `part`."""

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
    """Changes a section of a model's config.json, such as text_config."""

    def edit(hub: Path) -> None:
        path = hub / model / "config.json"
        config = json.loads(path.read_text())
        config[part] |= values
        path.write_text(json.dumps(config))

    return edit


def without(part: str, *models: str) -> Change:
    """Removes the tensors whose names contain `part` from models."""

    def edit(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if part in name]:
            del found[name]

    return lambda hub: [edited.edit_tensors(hub / model, edit) for model in models]


def content(path: str, **values: Any) -> Change:
    """Changes entries of a JSON file."""

    def edit(hub: Path) -> None:
        found = json.loads((hub / path).read_text()) if (hub / path).is_file() else {}
        (hub / path).write_text(json.dumps(found | values))

    return edit


def other_ids(hub: Path) -> None:
    """Gives words ids beyond the rows of the table."""
    path = hub / "base" / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"] = {word: n + 1000 * (word in WORDS) for word, n in found["model"]["vocab"].items()}
    path.write_text(json.dumps(found))


def no_tokenizer(hub: Path) -> None:
    for path in (hub / "base").glob("*token*"):
        path.unlink()


def file(path: str, content: str | bytes | None) -> Change:
    """Writes this content to a file, or removes the file."""

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


def entry(**values: Any) -> Change:
    """Changes the first task's entry in the suite."""

    def edit(hub: Path) -> None:
        path = hub / "configs" / "suite" / "mini.yaml"
        suite = OmegaConf.load(path)
        suite.tasks.first = OmegaConf.merge(suite.tasks.first, values)
        OmegaConf.save(suite, path)

    return edit


def with_one(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda labels: np.concatenate([labels[:-1], [value]])


def both_settings(**values: Any) -> Change:
    """Changes the configs of a base and its experts, and their generation settings."""
    names = ("config.json", GENERATION)
    changes = [content(f"{model}/{name}", **values) for model in ("base", *TASKS) for name in names]
    return lambda hub: [change(hub) for change in changes]
