"""State dicts in one file, as torch.save or safetensors wrote them. Code is never unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import DTYPES, SafetensorsFiles, TensorInfo, Tensors
from epmq_cli.runtime.paths import check_permitted

NAMES = {dtype: name for name, dtype in DTYPES.items()}
OPTIMIZER = "param_groups"
"""A key that the state of every optimizer of torch has."""
DEPTH = 3  # entries in entries


class StateDict:
    """The tensors of a state dict, or of the one state dict in what a trainer saved, such as `{"model": ...}`,
    `{"state_dict": ...}` or `{"module": ..., "optimizer": ...}`, mapped from the file where it allows that."""

    def __init__(self, path: Path, role: str) -> None:
        self._tensors = _load(path, role)
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> Tensor:
        """The tensor of this stored name."""
        return self._tensors[name]


def open_file(path: Path, role: str) -> Tensors:
    """The tensors of one file; ModelError where it is none of a state dict."""
    return SafetensorsFiles(path, role) if path.suffix == ".safetensors" else StateDict(path, role)


def _load(path: Path, role: str) -> dict[str, Tensor]:
    content = _unpickle(path, role)
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{role}: {path} holds a {type(content).__name__}, no state dict; save model.state_dict() with torch.save"
        )
    found = dict(_state_dicts(content, "", DEPTH))
    if len(found) > 1:
        keys = list(found)
        raise ModelError(
            f"{role}: {path} holds several state dicts, {', '.join(keys)}; save one of them alone, such as "
            f"torch.save(torch.load({str(path)!r}){_indexed(keys[0])}, 'one.pt')"
        )
    tensors = next(iter(found.values()), {str(name): value for name, value in content.items() if _is_tensor(value)})
    if not tensors:
        raise ModelError(f"{role}: {path} holds no tensors by name; save model.state_dict() with torch.save")
    odd = next((name for name, tensor in tensors.items() if not _is_plain(tensor)), None)
    if odd is not None:
        raise ModelError(
            f"{role}: {path} holds {odd!r} as a sparse, nested, quantized or empty tensor, epmq reads dense ones with "
            "their values; save model.state_dict() of the dense model with torch.save"
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}  # of named_parameters: they require gradients


def _state_dicts(content: Mapping[Any, Any], where: str, depth: int) -> list[tuple[str, dict[str, Tensor]]]:
    """The state dicts in what was saved, by where they are: those in its entries where one of them has more tensors
    than `content` itself, else `content`. A state dict has a tensor of floats with a dimension; states of optimizers
    are none, nor those of random generators."""
    if OPTIMIZER in content:
        return []
    tensors = {str(name): value for name, value in content.items() if _is_tensor(value)}
    entries = [(str(key), entry) for key, entry in content.items() if isinstance(entry, Mapping)] if depth else []
    inner = [found for key, entry in entries for found in _state_dicts(entry, f"{where}.{key}".strip("."), depth - 1)]
    if any(len(found) > len(tensors) for _, found in inner):
        return inner
    own = any(tensor.is_floating_point() and tensor.ndim for tensor in tensors.values())
    return [(where, tensors)] if own else inner


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _indexed(where: str) -> str:
    return "".join(f"[{key!r}]" for key in where.split("."))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its values in memory, one after the other; those on the meta device have none."""
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout == torch.strided and not odd


def _unpickle(path: Path, role: str) -> Any:
    check_permitted(path, ModelError, role)
    try:
        try:
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except RuntimeError:  # a file of the old format, which cannot be mapped, or a damaged one
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{role}: {path} is not a plain state dict but holds pickled objects such as a whole module, which epmq "
            "never runs; load it where its code is and save torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # of a damaged file, torch's unpickler raises whatever its bytes lead to
        reason = (str(error).splitlines() or ["it ends early"])[0]
        raise ModelError(
            f"{role}: {path} cannot be read as a state dict ({reason}); save model.state_dict() with torch.save"
        ) from error
