"""Reads state dicts in one file from torch.save or safetensors. Code is never unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import DTYPES, SafetensorsFiles, TensorInfo, Tensors
from epmq_cli.runtime.paths import check_permitted

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}
OPTIMIZER = "param_groups"
"""A key in the state of every torch optimizer."""
DEPTH = 3  # levels of nested entries


class StateDict:
    """The tensors of a state dict, or of the only state dict in a trainer's checkpoint.

    Examples of such checkpoints are `{"model": ...}`, `{"state_dict": ...}` and `{"module": ..., "optimizer": ...}`.
    The tensors are memory-mapped if the file format allows it.
    """

    def __init__(self, path: Path, role: str) -> None:
        self._tensors = _load(path, role)
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), NAMES.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name."""
        return self._tensors[name]


def open_file(path: Path, role: str) -> Tensors:
    """Opens the tensors of one file. Raises ModelError if it is not a state dict."""
    return SafetensorsFiles(path, role) if path.suffix == ".safetensors" else StateDict(path, role)


def _load(path: Path, role: str) -> dict[str, Tensor]:
    content = _unpickle(path, role)
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{role}: {path} contains a {type(content).__name__}, not a state dict; save model.state_dict() with "
            "torch.save"
        )
    state_dicts = dict(_state_dicts(content, "", DEPTH))
    if len(state_dicts) > 1:
        keys = list(state_dicts)
        raise ModelError(
            f"{role}: {path} contains several state dicts ({', '.join(keys)}); save one of them alone, for example "
            f"with torch.save(torch.load({str(path)!r}){_indexed(keys[0])}, 'one.pt')"
        )
    named = {str(name): value for name, value in content.items() if _is_tensor(value)}
    tensors = next(iter(state_dicts.values()), named)
    if not tensors:
        raise ModelError(f"{role}: {path} contains no named tensors; save model.state_dict() with torch.save")
    odd = next((name for name, tensor in tensors.items() if not _is_plain(tensor)), None)
    if odd is not None:
        raise ModelError(
            f"{role}: {path} contains {odd!r} as a sparse, nested, quantized or meta tensor, but epmq reads dense "
            "tensors only; save model.state_dict() of the dense model with torch.save"
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}  # parameters require gradients


def _state_dicts(content: Mapping[Any, Any], where: str, depth: int) -> list[tuple[str, dict[str, Tensor]]]:
    """The state dicts in `content`, each with its dotted key.

    These are the state dicts in the entries if one of them has more tensors than `content`, otherwise `content` itself.
    A state dict has a floating-point tensor with at least one dimension. States of optimizers and random generators do
    not count.
    """
    if OPTIMIZER in content:
        return []
    tensors = {str(name): value for name, value in content.items() if _is_tensor(value)}
    entries = [(str(key), entry) for key, entry in content.items() if isinstance(entry, Mapping)] if depth else []
    inner = [pair for key, entry in entries for pair in _state_dicts(entry, f"{where}.{key}".strip("."), depth - 1)]
    if any(len(state) > len(tensors) for _, state in inner):
        return inner
    own = any(tensor.is_floating_point() and tensor.ndim for tensor in tensors.values())
    return [(where, tensors)] if own else inner


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _indexed(where: str) -> str:
    return "".join(f"[{key!r}]" for key in where.split("."))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and has its values in memory. Tensors on the meta device have no values."""
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout == torch.strided and not odd


def _unpickle(path: Path, role: str) -> Any:
    check_permitted(path, ModelError, role)
    try:
        try:
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except RuntimeError:  # the old format cannot be memory-mapped; or the file is corrupted
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{role}: {path} is not a plain state dict: it contains pickled objects, such as a whole module, which "
            "epmq never loads; load it with its own code and run torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # on a corrupted file, torch's unpickler can raise any exception
        reason = (str(error).splitlines() or ["it ends early"])[0]
        raise ModelError(
            f"{role}: {path} cannot be read as a state dict ({reason}); save model.state_dict() with torch.save"
        ) from error
