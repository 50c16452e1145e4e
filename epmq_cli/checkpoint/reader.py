"""Lazy reading of a model: one tensor at a time, from one or many safetensors files or from another kind of source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq_cli.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating types by their safetensors names."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says of one tensor: shape, and the safetensors name of its type such as "F16"."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    infos: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU, in the type that `infos` says."""


class SafetensorsFiles:
    """The tensors of a folder's safetensors files, or of one such file. Opening reads headers only.

    ModelError: no safetensors, or files that are damaged.
    """

    def __init__(self, path: Path, role: str) -> None:
        self._folder, self._role = (path.parent if path.is_file() else path), role
        self._files: dict[str, Any] = {}
        weights = dict.fromkeys(self._open(path.name).keys(), path.name) if path.is_file() else self._weight_map()
        self._file_of = {name: self._open(file) for name, file in weights.items()}
        self.infos = {name: self._info(name) for name in self._file_of}

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name, on the CPU, in the type it is stored in."""
        try:
            tensor: Tensor = self._file_of[name].get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise ModelError(f"{self._role}: {name} in {self._folder} cannot be read ({error})") from error

    def _weight_map(self) -> dict[str, str]:
        if (self._folder / INDEX).is_file():
            weight_map: dict[str, str] = read_json(self._folder, INDEX, self._role)["weight_map"]
            return weight_map
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if len(files) == 1:
            return dict.fromkeys(self._open(files[0]).keys(), files[0])
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        hint = f", or name the file itself, such as {pickles[0]}" if pickles else ""
        raise ModelError(
            f"{self._role}: {self._folder} has no {SINGLE} and no {INDEX}; "
            f"save the model with save_pretrained of transformers{hint}"
        )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if path.name != file or not path.is_file():
                raise ModelError(
                    f"{self._role}: {file}, which the index of {self._folder} names, is not in that folder"
                )
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self._role}: {path} is damaged or not safetensors ({error}); fetch it again"
                ) from error
        return self._files[file]

    def _info(self, name: str) -> TensorInfo:
        try:
            header = self._file_of[name].get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._role}: {name}, which the index of {self._folder} names, is in no file") from error
        return TensorInfo(tuple(header.get_shape()), header.get_dtype())


class ModelFolder:
    """The tensors and config of a model. Opening it reads headers only; `tensor` reads one tensor.

    `path`: the folder, or the file that a suite named. `role` names the model in errors. `config`: its config.json
    unless given, as it is for sources that have none of their own: those have the base's, the very same object.
    `tensors`: the folder's safetensors files unless given. ModelError: no config.json, no safetensors, or damage.
    """

    def __init__(
        self, path: Path, role: str, config: dict[str, Any] | None = None, tensors: Tensors | None = None
    ) -> None:
        self.path = path
        self.role = role
        self.config = read_json(path, "config.json", role) if config is None else config
        self._tensors = SafetensorsFiles(path, role) if tensors is None else tensors
        self.infos = self._tensors.infos

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name, on the CPU, in the type that `infos` says."""
        return self._tensors.tensor(name)


def read_json(folder: Path, file: str, role: str) -> dict[str, Any]:
    """The content of a model folder's JSON file; ModelError where there is none or it is none."""
    path = folder / file
    if not path.is_file():
        raise ModelError(f"{role}: {folder} has no {file}; give the folder that save_pretrained wrote")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{role}: {path} is not valid JSON ({error})") from error
    return content
