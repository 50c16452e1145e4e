"""A dense merge as a model folder like the base's, written tensor by tensor while it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epmq_cli.checkpoint.write import whole
from epmq_cli.config.schema import Pack, bytes_of
from epmq_cli.errors import ModelError
from epmq_cli.merge.engine import LazyMerge, SuiteModels, written_dtype
from epmq_cli.merge.tied_weights import Ties
from epmq_cli.merge.vocabulary import with_vocabulary
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.runtime.console import track
from epmq_cli.store.safetensors_writer import NAMES, Entry, write_model


def write_dense(
    folder: Path,
    models: SuiteModels,
    merged: LazyMerge,
    pack: Pack,
    files: ProcessorFiles,
    save_others: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Writes the base's tensors under the base's names, those that are merged merged, in the base's types or in
    `pack.dtype`; with its config and `files`, the base's. `save_others`: writes further files and folders into the
    checkpoint's. Returns the bytes of the tensors.

    A copy that is tied to another tensor is not written, and one that is tied in the base but not in the result is;
    config.json says which, and the type of most elements. CheckpointError where the disk does not take it; then
    nothing is left.
    """
    base = models.base
    entries = _entries(base, merged, models.ties, pack)
    steps = iter(track(entries, "merge"))

    def counted(entry: Entry) -> torch.Tensor:
        next(steps)
        return entry.make()

    with whole(folder) as (partly, known):
        shown = [Entry(e.name, e.dtype, e.shape, partial(counted, e)) for e in entries]
        known |= write_model(partly, shown, bytes_of("pack.shard_size", pack.shard_size))
        config = _config(models, written_dtype(merged.source, pack.dtype))
        (partly / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files.copy(partly)
        save_others(partly)
    return sum(entry.size for entry in entries)


def _config(models: SuiteModels, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json with the result's ties, vocabulary and type; transformers and vLLM load all tensors in
    that type."""
    config = models.base.config | models.ties.changes | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    size = models.source.vocabulary_size
    return config if size is None else with_vocabulary(config, size)


def _entries(base: ModelFolder, merged: LazyMerge, ties: Ties, pack: Pack) -> list[Entry]:
    """What is written, in the order of the base's files, behind them what these do not hold."""
    source = merged.source
    names = {source.stored_name(name): name for name in source.names}
    found = []
    for stored in [*base.infos, *(name for name in names if name not in base.infos)]:
        name = names.get(stored)
        if name is not None:
            dtype = _type(base, source.read_name(name), pack)
            found.append(Entry(stored, dtype, source.shape(name), partial(merged.stored, name, dtype)))
        elif stored not in ties.dropped:
            dtype = _type(base, stored, pack)
            found.append(Entry(stored, dtype, base.infos[stored].shape, partial(_unmerged, base, stored, dtype)))
    return found


def _type(base: ModelFolder, stored: str, pack: Pack) -> torch.dtype:
    """The type in which a tensor of the base is written."""
    types = {name: dtype for dtype, name in NAMES.items()}
    kind = base.infos[stored].dtype
    if kind not in types:
        raise ModelError(f"base: {stored} is of type {kind}, epmq writes {', '.join(types)}")
    own = types[kind]
    chosen: torch.dtype = own if pack.dtype == "auto" or not own.is_floating_point else getattr(torch, pack.dtype)
    return chosen


def _unmerged(base: ModelFolder, name: str, dtype: torch.dtype) -> torch.Tensor:
    return base.tensor(name).to(dtype)
