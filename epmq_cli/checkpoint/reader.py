"""Lazy reading of a model folder: one tensor at a time, from one or many safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class ModelFolder:
    """The tensors and config of a model folder. Opening it reads headers only; `tensor` reads one tensor.

    `role` names the model in errors. ModelError: no config.json, no safetensors, or files that are damaged.
    """

    def __init__(self, path: Path, role: str) -> None:
        self.path = path
        self.role = role
        self.config = self._read_json("config.json")
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Any] = {}
        for name, file in self._weight_map().items():
            self._file_of[name] = self._open(file)
        self.infos = {name: self._info(name) for name in self._file_of}

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name, on the CPU, in the type it is stored in."""
        try:
            tensor: Tensor = self._file_of[name].get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise ModelError(f"{self.role}: {name} in {self.path} cannot be read ({error})") from error

    def _weight_map(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            weight_map: dict[str, str] = self._read_json(INDEX)["weight_map"]
            return weight_map
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        if len(files) == 1:
            return dict.fromkeys(self._open(files[0]).keys(), files[0])
        raise ModelError(
            f"{self.role}: {self.path} has no {SINGLE} and no {INDEX}; "
            "save the model with save_pretrained of transformers"
        )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.path / file
            if path.name != file or not path.is_file():
                raise ModelError(f"{self.role}: {file}, which the index of {self.path} names, is not in that folder")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self.role}: {path} is damaged or not safetensors ({error}); fetch it again"
                ) from error
        return self._files[file]

    def _info(self, name: str) -> TensorInfo:
        try:
            header = self._file_of[name].get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.role}: {name}, which the index of {self.path} names, is in no file") from error
        return TensorInfo(tuple(header.get_shape()), header.get_dtype())

    def _read_json(self, file: str) -> dict[str, Any]:
        path = self.path / file
        if not path.is_file():
            raise ModelError(f"{self.role}: {self.path} has no {file}; give the folder that save_pretrained wrote")
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{self.role}: {path} is not valid JSON ({error})") from error
        return content
