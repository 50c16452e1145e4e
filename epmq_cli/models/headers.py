"""Reads what a model folder says of its tensors without reading them: the headers of safetensors files, and JSON files.

Imports no torch, which takes seconds; model_folder.py reads the tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from epmq_cli.errors import ModelError
from epmq_cli.runtime.paths import check_permitted, leaves
from epmq_cli.store.weight_files import INDEX, SINGLE

FLOATS = ("F64", "F32", "F16", "BF16")
"""The floating-point types that epmq merges, by safetensors name."""
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
"""The bits of an element by safetensors name of its type; 8 for all others."""
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
"""Patterns of the files in a model folder that epmq or transformers reads. Pickles are excluded."""
TEMPLATES = "additional_chat_templates"
"""The only subfolder of a model folder that is also read."""
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
"""Suffixes of code files, which contain neither settings nor a vocabulary."""
MOST = 1 << 63  # elements in a shape
LAYERS = re.compile(r"^(?!max_).*layers?$")
LABELS = 1 << 20  # more than any classifier has


@dataclass(frozen=True)
class TensorInfo:
    """The header entry of one tensor: its shape and the safetensors name of its type, such as "F16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * BITS.get(self.dtype, 8) // 8


class SafetensorsHeaders:
    """Names, shapes and types of the tensors of one safetensors file, or of all in a folder.

    Raises ModelError if there are no safetensors files, or if a file is corrupted or malicious. Before it allocates
    memory, the safetensors library rejects headers that are larger than 100 MB or than the file. It also rejects
    tensors that overlap, leave gaps, or whose size does not match their type and shape.
    """

    def __init__(self, path: Path, role: str) -> None:
        self._folder, self._role = (path.parent if path.is_file() else path), role
        self._files: dict[str, Any] = {}
        weights = dict.fromkeys(self._open(path.name).keys(), path.name) if path.is_file() else self._weight_map()
        self.names_of = weights
        self._file_of = {name: self._open(file) for name, file in weights.items()}
        self.infos = {name: self._info(name) for name in self._file_of}

    def _weight_map(self) -> dict[str, str]:
        if (self._folder / SINGLE).is_file():  # takes precedence over an index, as in transformers
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        if (self._folder / INDEX).is_file():
            return self._index()
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if len(files) == 1:
            return dict.fromkeys(self._open(files[0]).keys(), files[0])
        raise ModelError(
            f"{self._role}: {self._folder} has neither {SINGLE} nor {INDEX}; "
            "save the model with save_pretrained of transformers"
        )

    def _index(self) -> dict[str, str]:
        weight_map = read_json(self._folder, INDEX, self._role).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(
                f"{self._role}: {self._folder / INDEX} has no weight_map (tensor name: file name); save the model with "
                "save_pretrained of transformers"
            )
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if path.name != file or not path.is_file():
                raise ModelError(
                    f"{self._role}: the index of {self._folder} names {file!r}, which is not in that folder; "
                    "fetch the model again"
                )
            check_permitted(path, ModelError, self._role)  # safetensors would report a missing file
            try:
                self._files[file] = safe_open(path, framework="numpy")
                _refuse_repeated_names(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelError(
                    f"{self._role}: {path} is corrupted or not a safetensors file ({error}); fetch it again"
                ) from error
        return self._files[file]

    def _info(self, name: str) -> TensorInfo:
        try:
            header = self._file_of[name].get_slice(name)
        except SafetensorError as error:
            raise ModelError(
                f"{self._role}: the index of {self._folder} names the tensor {name!r}, which is not in its file; "
                "fetch the model again"
            ) from error
        shape = tuple(header.get_shape())
        if prod(max(size, 1) for size in shape) >= MOST:  # safetensors accepts it if another axis has size 0
            raise ModelError(
                f"{self._role}: {name} in {self._folder} has the impossible shape {list(shape)}; fetch it again"
            )
        return TensorInfo(shape, header.get_dtype())


def _refuse_repeated_names(path: Path) -> None:
    """Raises ValueError if a file's header repeats a tensor name.

    The safetensors library accepts this and takes the last entry; other readers may take another.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("its header repeats a name")
        return entries

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=unique)


def read_json(folder: Path, file: str, role: str) -> dict[str, Any]:
    """Reads a JSON object from a model folder. Raises ModelError if it is missing or a link leaves the folder."""
    path = folder / file
    if not path.is_file():
        raise ModelError(f"{role}: {folder} has no {file}; give the folder that save_pretrained wrote")
    refuse_links(folder, role)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{role}: {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{role}: {path} is not a JSON object; give the folder that save_pretrained wrote")
    return content


def check_counts(path: Path, role: str, config: dict[str, Any], tensors: int) -> None:
    """Raises ModelError if a config asks for more layers than the model has tensors, or for too many labels.

    transformers creates an object for each layer and label before it reads the tensors.
    """
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
    """The files of a model folder that epmq or transformers reads, sorted, without hidden files."""
    inner = folder / TEMPLATES
    paths = [*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]
    files = [path for path in paths if any(fnmatchcase(path.name, pattern) for pattern in READ) and not path.is_dir()]
    return sorted(path for path in files if not path.name.startswith("."))


def refuse_links(folder: Path, role: str) -> None:
    """Raises ModelError if one of a folder's files is unreadable or a link that leaves the folder.

    The target of such a link could end up in a checkpoint.
    """
    for path in read_files(folder):
        check_permitted(path, ModelError, role)
        if leaves(path, folder):
            raise ModelError(
                f"{role}: {path} is a link to {path.resolve()}, outside its folder; replace the link with the file"
            )
