"""Lazy reading of a model: one tensor at a time, from one or many safetensors files or from another kind of source."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.other_formats import refuse_other_formats
from epmq_cli.runtime.links import leaves
from epmq_cli.runtime.paths import check_permitted
from epmq_cli.store.safetensors_writer import INDEX, SINGLE

NAMED = "transformers_weights"  # of a config.json
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating types by their safetensors names."""
READ = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.model.v*",
    "*.jinja",
    "*.codes",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
)
"""Names of the files of a model folder that epmq or transformers read: no pickles among them."""
TEMPLATES = "additional_chat_templates"
"""The folder in a model folder that is read too."""
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
WEIGHTS = (
    *PICKLES,
    ".distcp",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npy",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".safetensors",
    ".tflite",
)
CODE = (".ipynb", ".py", ".sh")
"""Endings of files that hold neither settings nor words."""
MOST = 1 << 63  # items that a shape can describe
LAYERS = re.compile(r"^(?!max_).*layers?$")
LABELS = 1 << 20  # more than any classifier has


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

    ModelError: no safetensors, or files that are damaged or made to mislead. The library itself refuses headers of
    more than 100 MB or than the file has, and tensors that overlap, leave gaps, or do not have the bytes of their type
    and shape, before it takes memory for them.
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
        if (self._folder / SINGLE).is_file():  # before an index, as transformers does
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        if (self._folder / INDEX).is_file():
            return self._index()
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if len(files) == 1:
            return dict.fromkeys(self._open(files[0]).keys(), files[0])
        raise ModelError(
            f"{self._role}: {self._folder} has no {SINGLE} and no {INDEX}; "
            "save the model with save_pretrained of transformers"
        )

    def _index(self) -> dict[str, str]:
        weight_map = read_json(self._folder, INDEX, self._role).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(
                f"{self._role}: {self._folder / INDEX} has no weight_map from tensors to files; save the model with "
                "save_pretrained of transformers"
            )
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if path.name != file or not path.is_file():
                raise ModelError(
                    f"{self._role}: {file!r}, which the index of {self._folder} names, is not in that folder"
                )
            check_permitted(path, ModelError, self._role)  # the library says that it is not there
            try:
                self._files[file] = safe_open(path, framework="pt")
                _refuse_repeated_names(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelError(
                    f"{self._role}: {path} is damaged or not safetensors ({error}); fetch it again"
                ) from error
        return self._files[file]

    def _info(self, name: str) -> TensorInfo:
        try:
            header = self._file_of[name].get_slice(name)
        except SafetensorError as error:
            raise ModelError(
                f"{self._role}: {name!r}, which the index of {self._folder} names, is in no file"
            ) from error
        shape = tuple(header.get_shape())
        if prod(max(size, 1) for size in shape) >= MOST:  # the library lets this pass beside a size of 0
            raise ModelError(f"{self._role}: {name} in {self._folder} has the impossible shape {list(shape)}")
        return TensorInfo(shape, header.get_dtype())


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
        if config is None:
            refuse_other_formats(path, role)
        self.config = read_json(path, "config.json", role) if config is None else config
        if self.config.get(NAMED) is not None:
            raise ModelError(
                f"{role}: {path / 'config.json'} names files of its own ({NAMED}), which transformers would read and "
                f"epmq does not; call them {SINGLE} or {INDEX} and take {NAMED} out"
            )
        self._tensors = SafetensorsFiles(path, role) if tensors is None else tensors
        self.infos = self._tensors.infos
        if config is None:
            check_counts(path / "config.json", role, self.config, len(self.infos))

    @property
    def source(self) -> Tensors:
        """What the tensors are read from."""
        return self._tensors

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name, on the CPU, in the type that `infos` says."""
        return self._tensors.tensor(name)


class Completed:
    """An expert's tensors, and the base's in place of those that it does not have."""

    def __init__(self, expert: ModelFolder, base: ModelFolder, names: Collection[str]) -> None:
        self._expert, self._base = expert, base
        self.infos: dict[str, TensorInfo] = {name: base.infos[name] for name in names} | expert.infos

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name."""
        return (self._expert if name in self._expert.infos else self._base).tensor(name)


def _refuse_repeated_names(path: Path) -> None:
    """ValueError where the header of a file that the library accepts names a tensor twice: it takes the last one, other
    readers may not."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has a name twice")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=unique)


def read_json(folder: Path, file: str, role: str) -> dict[str, Any]:
    """The object in a model folder's JSON file; ModelError where there is none, or the folder has links out of it."""
    path = folder / file
    if not path.is_file():
        raise ModelError(f"{role}: {folder} has no {file}; give the folder that save_pretrained wrote")
    refuse_links(folder, role)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{role}: {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{role}: {path} holds no JSON object; give the folder that save_pretrained wrote")
    return content


def check_counts(path: Path, role: str, config: dict[str, Any], tensors: int) -> None:
    """ModelError where the config in a file asks for more layers than there are tensors, or for too many labels:
    transformers makes an object of each before it looks at the tensors."""
    rest = [config]
    while rest:
        for key, value in rest.pop().items():
            most = tensors if LAYERS.search(key) else LABELS if key == "num_labels" else None
            if isinstance(value, dict):
                rest.append(value)
            elif isinstance(value, int) and most is not None and value > most:
                raise ModelError(
                    f"{role}: {path} asks for {key}={value}, which a model of {tensors} tensors "
                    "cannot have; fetch it again"
                )


def read_files(folder: Path) -> list[Path]:
    """The files of a model folder that epmq or transformers read, in order; hidden ones are not."""
    inner = folder / TEMPLATES
    paths = [*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]
    found = [path for path in paths if any(fnmatchcase(path.name, pattern) for pattern in READ) and not path.is_dir()]
    return sorted(path for path in found if not path.name.startswith("."))


def refuse_links(folder: Path, role: str) -> None:
    """ModelError where one of a folder's files is a link out of it, as what it leads to could end up in a checkpoint,
    or may not be read."""
    for path in read_files(folder):
        check_permitted(path, ModelError, role)
        if leaves(path, folder):
            raise ModelError(
                f"{role}: {path} is a link to {path.resolve()}, outside of its folder; put the file itself there"
            )
