"""The metadata of a model card, in the form that the hub reads (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from epmq_cli.data.suite import Suite
from epmq_cli.errors import EpmqError
from epmq_cli.models.open_clip.config import SCHEME
from epmq_cli.models.resolve import HUB_ID, SHIPPED_SCHEME
from epmq_cli.runtime.paths import read_regular

OPEN_CLIP_HUB = f"{SCHEME}hf-hub:"
LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.S | re.M)
SENTENCES = "sentence-similarity"
"""The kind of task of models that sentence-transformers loads."""
TYPES = {"matthews": "matthews_correlation", "spearman": "spearmanr", "pearson": "pearsonr"}
"""The names of metrics on the hub, where they differ from epmq's."""


def front_matter(metadata: Mapping[str, Any]) -> str:
    """The metadata as YAML between its fences. Whatever names contain stays a value."""
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{text}---\n"


def base_models(suite: Suite) -> list[str]:
    """The hub ids of base and experts, without those that are folders, files or other names."""
    sources = [suite.base, *(task.expert for task in suite.members)]
    return list(dict.fromkeys(name for name in map(hub_id, sources) if name))


def hub_id(source: str) -> str | None:
    """The `owner/name` on the hub of a model as suites name it; None if it is from elsewhere."""
    source = source.removeprefix(OPEN_CLIP_HUB)
    if source.startswith((SHIPPED_SCHEME, SCHEME)) or Path(source).expanduser().exists():
        return None
    match = HUB_ID.fullmatch(source)
    return match["repo"] if match and match["repo"].count("/") == 1 else None


def license_of(folder: Path) -> str | None:
    """The licence that the config or the card of a model folder names; None if they name none."""
    for read in (_config, _card):
        try:
            name = read(folder).get("license")
        except (OSError, ValueError, RecursionError, AttributeError, yaml.YAMLError, EpmqError):
            continue
        if isinstance(name, str) and LICENSE.fullmatch(name):
            return name
    return None


def _config(folder: Path) -> Any:
    return json.loads(read_regular(folder / "config.json"))


def _card(folder: Path) -> Any:
    front = FRONT.match(read_regular(folder / "README.md"))
    return yaml.safe_load(front[1]) if front else {}


def model_index(suite: Suite, kind: str | None, scores: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """The scores of the model by task, as the hub shows them. `scores`: those of metrics.json; `kind`: the kind of
    task in the words of the hub."""
    data = {task.name: task.data for task in suite.members}
    results = [
        {
            "task": {"type": kind or "other"},
            "dataset": _dataset(name, data.get(name)),
            "metrics": [{"type": TYPES.get(metric, metric), "value": round(float(scores["tasks"][name][stage]), 6)}],
        }
        for name, metric in scores["metrics"].items()
        if stage in scores["tasks"][name]
    ]
    return [{"name": suite.name, "results": results}] if results else []


def _dataset(task: str, data: object) -> dict[str, str]:
    """The data set of a task: its id on the hub, if it is from there."""
    source = getattr(data, "path", None) if type(data).__name__ == "Hub" else None
    if not isinstance(source, str):
        return {"name": task, "type": task}
    own = {"config": getattr(data, "name", None), "split": getattr(data, "test", None)}
    return {"name": task, "type": source, **{key: value for key, value in own.items() if isinstance(value, str)}}


def metadata(
    suite: Suite, pipeline: str | None, tags: Sequence[str], license: str | None, index: list[dict[str, Any]]
) -> dict[str, Any]:
    """The metadata of a card; keys without a value are left out. `tags`: further ones. `index`: see `model_index`."""
    models, quantized = base_models(suite), "quantization" in tags
    entries: dict[str, Any] = {
        "library_name": "sentence-transformers" if pipeline == SENTENCES else "transformers",
        "pipeline_tag": pipeline,
        "license": license,
        "base_model": models,
        "base_model_relation": ("quantized" if quantized else "merge") if models else None,
        "tags": ["merge", *tags, "epmq"],
        "model-index": index,
    }
    return {key: value for key, value in entries.items() if value}
