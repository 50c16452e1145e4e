"""Warns if an adapter may have been trained on another base.

A LoRA fits every model of the same shapes, so epmq compares the adapter's config and its copies of base tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import EpmqError
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder, read_json
from epmq_cli.runtime.console import log, say

if TYPE_CHECKING:
    from torch import Tensor

CACHED = re.compile(r"models--(?P<id>.+)")
SETTINGS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "tie_word_embeddings",
)
"""Keys in config.json that two versions of a model share."""

COMPARED = 4  # tensors compared with a local folder


def warn_of_another_base(adapted: Adapted, role: str, base: ModelFolder) -> None:
    """Warns if an adapter names another base model, or contains tensors of another base.

    Prints a note if the adapter names no base model.
    """
    named = adapted.config.values.get("base_model_name_or_path")
    differences = [
        *_other_copies(adapted, base),
        *_other_config(adapted.path, base),
        *_other_model(named, adapted, base),
    ]
    for difference in differences:
        log.warning("%s: %s; check whether the adapter %s was trained on the base", role, difference, adapted.path)
    if not isinstance(named, str) or not named:
        say(
            f"{role}: the adapter {adapted.path} does not name the model that it was trained on; the names and shapes "
            f"of its {len(adapted.changed)} tensors fit the base ({base.path}), but the weights cannot be compared"
        )


def _other_copies(adapted: Adapted, base: ModelFolder) -> Iterator[str]:
    """Yields the base tensors that the adapter's file contains with other values."""
    for name in sorted(adapted.copies):
        if name not in base.infos:
            continue
        own, other = adapted.copy(name), base.tensor(name)
        rows = min(len(own), len(other)) if own.ndim else 0
        if own.shape[1:] != other.shape[1:] or not _alike(own[:rows], other[:rows]):
            yield f"its file contains the {name} of its own base, which differs from that of the base ({base.path})"


def _other_config(path: Path, base: ModelFolder) -> Iterator[str]:
    """Yields the settings in a config.json beside the adapter that differ from the base's."""
    if not (path / "config.json").is_file():
        return
    config = read_json(path, "config.json", "")
    for name in _differing(config, base.config):
        yield f"{path / 'config.json'} sets {name}={config[name]}, but the base ({base.path}) has {base.config[name]}"


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in SETTINGS if name in one and name in other and one[name] != other[name]]


def _other_model(named: object, adapted: Adapted, base: ModelFolder) -> Iterator[str]:
    """Yields how the base differs from the model that the adapter names: in values if it is local, else in name."""
    if not isinstance(named, str) or not named:
        return
    folder = Path(named)
    try:
        here = (folder / "config.json").is_file()
        if here and folder.resolve() == base.path.resolve():
            return
        if here:
            yield from _other_tensors(folder, adapted, base)
            return
    except (OSError, ValueError, EpmqError):  # the name and its folder can contain anything
        pass
    names = _names(base)
    revision = adapted.config.values.get("revision")
    if not _same_name(named, names):
        yield (
            f"it was trained on {named}, but the base is {base.path}: names and shapes fit, but the weights cannot be "
            "compared"
        )
    elif (
        isinstance(revision, str)
        and re.fullmatch(r"[0-9a-f]{40}", revision)
        and _snapshot(base) not in (None, revision)
    ):
        yield f"it was trained on revision {revision} of {named}, but the base is revision {_snapshot(base)}"


def _other_tensors(folder: Path, adapted: Adapted, base: ModelFolder) -> Iterator[str]:
    """Yields the first difference in a few tensors between the base and the folder that the adapter names."""
    other = ModelFolder(folder, "")
    common = [name for name in base.infos if name in other.infos]
    changed = sorted(name for name in adapted.changed if name in common)
    small = sorted(common, key=lambda name: prod(base.infos[name].shape))
    for name in list(dict.fromkeys([*changed[:1], *changed[-1:], *small]))[:COMPARED]:
        if not _alike(other.tensor(name), base.tensor(name)):
            yield f"it was trained on {folder}, whose {name} differs from that of the base ({base.path})"
            return


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to rounding if their types differ."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    coarse = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps if dtype.is_floating_point else 0)
    return torch.equal(one.to(coarse), other.to(coarse))


def _names(base: ModelFolder) -> set[str]:
    """The possible names of the base: its folder with and without the parent, its hub id, the name in its config."""
    names = {base.path.name, "/".join(base.path.parts[-2:])}
    names |= {cached["id"].replace("--", "/", 1) for part in base.path.parts if (cached := CACHED.fullmatch(part))}
    own = base.config.get("_name_or_path")
    return {name.lower() for name in names | ({own} if isinstance(own, str) else set()) if name}


def _same_name(named: str, names: Collection[str]) -> bool:
    """Whether one of the names equals `named`, or has the same last part."""
    own = named.replace("\\", "/").rstrip("/").lower()
    return any(own == name or own.rpartition("/")[2] == name.rpartition("/")[2] for name in names)


def _snapshot(base: ModelFolder) -> str | None:
    """The commit of a base in the hub's cache, or None."""
    return base.path.name if base.path.parent.name == "snapshots" else None
