"""A dense merge as a model folder like the base's, written tensor by tensor while it is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from epmq_cli.checkpoint.pack import PROCESSOR_FILES, whole
from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.checkpoint.writer import NAMES, Entry, write_model
from epmq_cli.config import Pack, bytes_of
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.merge.apply import Merged


def write_dense(
    folder: Path,
    base: ModelFolder,
    merged: Merged,
    pack: Pack,
    save_others: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Writes the base's tensors under the base's names, those that are merged merged, in the base's types or in
    `pack.dtype`; with its config and processor files. `save_others`: writes further files and folders into the
    checkpoint's. Returns the bytes of the tensors.

    CheckpointError where the disk does not take it; then there is no folder.
    """
    entries = _entries(base, merged, pack)
    steps = iter(track(entries, "merge"))

    def counted(entry: Entry) -> torch.Tensor:
        next(steps)
        return entry.make()

    with whole(folder) as (partly, known):
        shown = [Entry(e.name, e.dtype, e.shape, partial(counted, e)) for e in entries]
        known |= write_model(partly, shown, bytes_of("pack.shard_size", pack.shard_size))
        config = dict(base.config)
        size = merged.source.vocabulary_size
        if size is not None:
            config["vocab_size"] = size
        if pack.dtype != "auto":
            config["dtype"] = pack.dtype
            config.pop("torch_dtype", None)
        (partly / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in PROCESSOR_FILES:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, partly / name)
        save_others(partly)
    return sum(entry.size for entry in entries)


def _entries(base: ModelFolder, merged: Merged, pack: Pack) -> list[Entry]:
    """What is written, in the order of the base's files."""
    names = {merged.source.stored_name(name): name for name in merged.source.names}
    types = {name: dtype for dtype, name in NAMES.items()}
    found = []
    for stored, info in base.infos.items():
        if info.dtype not in types:
            raise ModelError(f"base: {stored} is of type {info.dtype}, written are {', '.join(types)}")
        own = types[info.dtype]
        dtype: torch.dtype = own if pack.dtype == "auto" or not own.is_floating_point else getattr(torch, pack.dtype)
        name = names.get(stored)
        if name is None:
            found.append(Entry(stored, dtype, info.shape, partial(_unmerged, base, stored, dtype)))
        else:
            make = partial(merged.stored, name, dtype)
            found.append(Entry(stored, dtype, merged.source.shape(name), make))
    return found


def _unmerged(base: ModelFolder, name: str, dtype: torch.dtype) -> torch.Tensor:
    return base.tensor(name).to(dtype)
