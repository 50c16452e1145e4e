"""Writes safetensors files (https://huggingface.co/docs/safetensors) tensor by tensor: first the header, since all
shapes are known, then each tensor when it is computed. While one is written and hashed, the next is computed, so at
most two are in memory.

The writers of huggingface_hub and safetensors need all tensors in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import CheckpointError
from epmq_cli.quantize.linalg import is_finite
from epmq_cli.store.hashing import Content
from epmq_cli.store.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
}
"""The safetensors name of each type, by its name in torch."""


def writable_types() -> dict[str, torch.dtype]:
    """The types that can be written, by safetensors name."""
    return {stored: getattr(torch, name.removeprefix("torch.")) for name, stored in NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, type and shape, and a function that computes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def of(name: str, tensor: Tensor) -> Entry:
    """The entry of a tensor that exists already."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


FILE_BYTES = 64
"""The most bytes of a file without tensors: the length of its header, the metadata and the padding."""


def most_bytes(entry: Entry, digits: int) -> int:
    """The most bytes that an entry takes in a file of at most 10^digits bytes: those of its data and of its part of the
    header."""
    own = {"dtype": NAMES[str(entry.dtype)], "shape": list(entry.shape), "data_offsets": [10**digits - 1] * 2}
    return entry.size + len(json.dumps({entry.name: own}, separators=(",", ":")).encode())


def write_model(folder: Path, entries: Iterable[Entry], shard_bytes: int) -> dict[str, Content]:
    """Writes model.safetensors, or shards of at most `shard_bytes` (or of one larger tensor) and their index.

    Returns the contents of the tensors' files, by name.
    """
    shards = _shards(entries, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    written = {file: write_file(folder / file, shard) for file, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        sizes = {"total_size": sum(entry.size for shard in shards for entry in shard)}
        files = {entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard}
        text = json.dumps({"metadata": sizes, "weight_map": dict(sorted(files.items()))}, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    return written


def write_file(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> Content:
    """Writes one file and returns its content. Wide types come first, so that every tensor begins at a multiple of its
    items' size. `metadata`: texts by name, for the header.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for entry in ordered:
        end = start + entry.size
        header[entry.name] = {
            "dtype": NAMES[str(entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as behind:  # both release the interpreter's lock

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        writing = behind.submit(put, len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            data = _bytes(entry)
            writing.result()
            writing = behind.submit(put, data)
        writing.result()
    return Content(8 + len(text) + start, digest.hexdigest())


def _bytes(entry: Entry) -> memoryview:
    tensor = entry.make()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
    check_finite(entry.name, tensor)
    flat = (
        tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))
    )  # flatten keeps the odd stride of a single item
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def check_finite(name: str, tensor: Tensor) -> None:
    """CheckpointError if a tensor to write holds a NaN or an infinity."""
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.float()  # torch does not sum FP8
    if tensor.is_floating_point() and not is_finite(tensor):
        raise CheckpointError(
            f"{name} would hold a NaN or an infinity in {str(tensor.dtype).removeprefix('torch.')}, and nothing is "
            "written; choose another pack.dtype, such as bfloat16, or a larger guidance.lam"
        )


def _shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards
