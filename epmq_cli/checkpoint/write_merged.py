"""Writes a merged model as a dense model folder like the base's, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.write import whole
from epmq_cli.config.schema import bytes_of
from epmq_cli.errors import ModelError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.suite_models import SuiteModels, written_dtype
from epmq_cli.merge.tied_weights import Ties
from epmq_cli.merge.vocabulary import with_vocabulary
from epmq_cli.models.merged_tokenizer import MergedTokenizer
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.models.stored import as_stored
from epmq_cli.runtime.progress import track
from epmq_cli.store.safetensors_writer import Entry, writable_types, write_model


def write_dense(
    folder: Path,
    models: SuiteModels,
    merged: LazyMerge,
    exporter: Exporter,
    files: ProcessorFiles | MergedTokenizer,
    save_others: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Writes all tensors of the base under their names, merged ones with their merged values; returns their bytes.

    Tensors keep the base's types unless `pack.dtype` names another. `files`: the base's processor files, which are
    copied, or a new tokenizer. `save_others`: writes further files and folders into the checkpoint folder.

    Copies that are tied in the result are not written; copies that are tied only in the base are. config.json
    states the ties and the type of most elements. CheckpointError if the disk is full or read-only; then nothing is
    left behind.
    """
    base = models.base
    entries = _entries(base, merged, models.ties, exporter.dtype)
    steps = iter(track(entries, "merge"))

    def make(entry: Entry) -> torch.Tensor:
        next(steps)
        return entry.make()

    with whole(folder) as (partly, hashed):
        tracked = [Entry(e.name, e.dtype, e.shape, partial(make, e)) for e in entries]
        hashed |= write_model(partly, tracked, bytes_of("pack.shard_size", exporter.shard_size))
        config = _config(models, written_dtype(merged.source, exporter.dtype))
        (partly / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files.copy(partly)
        save_others(partly)
    return sum(entry.size for entry in entries)


def _config(models: SuiteModels, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json with the ties, the vocabulary and the type of the result; transformers and vLLM load all
    tensors in that type."""
    config = models.base.config | models.ties.changes | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    size = models.source.vocabulary_size
    return config if size is None else with_vocabulary(config, size)


def _entries(base: ModelFolder, merged: LazyMerge, ties: Ties, option: str) -> list[Entry]:
    """The tensors to write: those of the base's files in their order, then those that the files do not hold."""
    source = merged.source
    names = {source.stored_name(name): name for name in source.names}
    entries = []
    for stored in [*base.infos, *(name for name in names if name not in base.infos)]:
        name = names.get(stored)
        if name is not None:
            dtype = _type(base, source.read_name(name), option)
            entries.append(Entry(stored, dtype, source.shape(name), partial(merged.stored, name, dtype)))
        elif stored not in ties.dropped:
            dtype = _type(base, stored, option)
            entries.append(Entry(stored, dtype, base.infos[stored].shape, partial(_unmerged, base, stored, dtype)))
    return as_stored(base.config.get("model_type"), entries)


def _type(base: ModelFolder, stored: str, option: str) -> torch.dtype:
    """The type to write a tensor of the base in; `option`: `pack.dtype`."""
    types = writable_types()
    kind = base.infos[stored].dtype
    if kind not in types:
        raise ModelError(f"base: {stored} is of type {kind}, epmq writes {', '.join(types)}")
    own = types[kind]
    chosen: torch.dtype = own if option == "auto" or not own.is_floating_point else getattr(torch, option)
    return chosen


def _unmerged(base: ModelFolder, name: str, dtype: torch.dtype) -> torch.Tensor:
    return base.tensor(name).to(dtype)
