"""Reads a model lazily, one tensor at a time, from one or more safetensors files or from another source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from epmq_cli.errors import ModelError
from epmq_cli.models.headers import (
    CODE,
    FLOATS,
    PICKLES,
    READ,
    TEMPLATES,
    WEIGHTS,
    SafetensorsHeaders,
    TensorInfo,
    check_counts,
    read_files,
    read_json,
    refuse_links,
)
from epmq_cli.models.other_formats import refuse_other_formats
from epmq_cli.models.stored import as_linears
from epmq_cli.store.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CODE",
    "DTYPES",
    "PICKLES",
    "READ",
    "TEMPLATES",
    "WEIGHTS",
    "Completed",
    "ModelFolder",
    "SafetensorsFiles",
    "TensorInfo",
    "Tensors",
    "check_counts",
    "dtype_of",
    "read_files",
    "read_json",
    "refuse_links",
]

NAMED = "transformers_weights"  # key in config.json
DTYPES = dict(zip(FLOATS, ("float64", "float32", "float16", "bfloat16"), strict=True))
"""The names in torch of the floating-point types, by safetensors name."""


def head_width(config: Mapping[str, Any]) -> int:
    """The width of an attention head, by a config.json."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def dtype_of(name: str) -> torch.dtype:
    """The type with this safetensors name, one of `DTYPES`."""
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    infos: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name on the CPU, in the type from `infos`."""


class SafetensorsFiles(SafetensorsHeaders):
    """The tensors of one safetensors file, or of all safetensors files in a folder. Opening reads headers only, without
    torch."""

    def __init__(self, path: Path, role: str) -> None:
        super().__init__(path, role)
        self._opened: dict[str, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name on the CPU, in its stored type."""
        return self._read(name, lambda file: file.get_tensor(name))

    def row(self, name: str, index: int) -> Tensor:
        """Returns one row of the tensor of this stored name, and reads no other."""
        return self._read(name, lambda file: file.get_slice(name)[index])

    def _read(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        try:
            file = self.names_of[name]
            if file not in self._opened:
                self._opened[file] = safe_open(self._folder / file, framework="pt")
            return read(self._opened[file])
        except SafetensorError as error:
            raise ModelError(
                f"{self._role}: {name} in {self._folder} cannot be read ({error}); fetch it again"
            ) from error


def model_files(folder: Path, role: str) -> Tensors:
    """The tensors of a folder's safetensors files, see stored.py."""
    return as_linears(read_json(folder, "config.json", role), SafetensorsFiles(folder, role))


class ModelFolder:
    """The tensors and config of a model. Opening it reads headers only; `tensor` reads one tensor.

    `path`: the folder, or the file that a suite names. `role`: the name of the model in error messages. `config`:
    defaults to the folder's config.json; a source without its own config shares the base's config object. `tensors`:
    defaults to the folder's safetensors files, see stored.py. Raises ModelError if config.json or the safetensors files
    are missing or corrupted.
    """

    def __init__(
        self, path: Path, role: str, config: dict[str, Any] | None = None, tensors: Tensors | None = None
    ) -> None:
        self.path = path
        self.role = role
        if config is None:
            refuse_other_formats(path, role)
        self.config = read_json(path, "config.json", role) if config is None else config
        if self.config.get(NAMED) is not None:
            raise ModelError(
                f"{role}: {path / 'config.json'} sets {NAMED}, which epmq does not support; rename the weights to "
                f"{SINGLE} or {INDEX} and remove {NAMED}"
            )
        self._tensors: Tensors = as_linears(self.config, SafetensorsFiles(path, role)) if tensors is None else tensors
        self.infos = self._tensors.infos
        if config is None:
            check_counts(path / "config.json", role, self.config, len(self.infos))

    @property
    def source(self) -> Tensors:
        """The source of the tensors."""
        return self._tensors

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name on the CPU, in the type from `infos`."""
        return self._tensors.tensor(name)


class Completed:
    """An expert's tensors, with the base's tensors for those that the expert lacks."""

    def __init__(self, expert: ModelFolder, base: ModelFolder, names: Collection[str]) -> None:
        self.expert, self._base = expert, base
        self.infos: dict[str, TensorInfo] = {name: base.infos[name] for name in names} | expert.infos

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name."""
        return (self.expert if name in self.expert.infos else self._base).tensor(name)
