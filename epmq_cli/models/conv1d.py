"""The linears of GPT-2, whose files and modules hold weights as (in, out): the class Conv1D of transformers.

To the rest of epmq they are linears with weights (out, in). Tensors are turned when they are read (`upright`) and
written (`as_stored`), modules when a model is built (`with_linears`). No other module knows of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from epmq_cli.models.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.store.safetensors_writer import Entry

WEIGHT = re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|mlp)\.(?:c_attn|c_proj|c_fc)(?:\.base_layer)?\.weight")
TURNED = {"gpt2": WEIGHT}
"""By model type, the stored names of the weights that are (in, out)."""


class Named(Protocol):
    """Named tensors that are read one at a time."""

    infos: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""


def _pattern(config: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The pattern of the weights that files of models with this config.json hold as (in, out); None if there are none.
    The config may be damaged."""
    return TURNED.get(str(config.get("model_type")))


def is_turned(config: Mapping[str, Any]) -> bool:
    """Whether the files of models with this config.json hold weights of linears as (in, out)."""
    return _pattern(config) is not None


def upright(config: Mapping[str, Any], tensors: Named) -> Named:
    """The stored tensors of a model with this config.json, with the weights of linears as (out, in)."""
    pattern = _pattern(config)
    return tensors if pattern is None else Upright(tensors, pattern)


def upright_infos(config: Mapping[str, Any], infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same for the headers of the tensors."""
    pattern = _pattern(config)
    return infos if pattern is None else _upright(infos, pattern)


def _upright(infos: dict[str, TensorInfo], pattern: re.Pattern[str]) -> dict[str, TensorInfo]:
    return {
        name: replace(info, shape=info.shape[::-1]) if pattern.fullmatch(name) else info for name, info in infos.items()
    }


class Upright:
    """The tensors of a model in files, with the weights whose names match a pattern as (out, in)."""

    def __init__(self, tensors: Named, pattern: re.Pattern[str]) -> None:
        self._tensors, self._pattern = tensors, pattern
        self.infos = _upright(tensors.infos, pattern)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name."""
        tensor = self._tensors.tensor(name)
        return tensor.T.contiguous() if self._pattern.fullmatch(name) else tensor


def as_stored(model_type: str | None, entries: Iterable[Entry]) -> list[Entry]:
    """The tensors of a model as its files hold them. `entries`: with the weights of linears as (out, in)."""
    pattern = TURNED.get(model_type or "")
    return [_turned(entry) if pattern and pattern.fullmatch(entry.name) else entry for entry in entries]


def _turned(entry: Entry) -> Entry:
    return replace(entry, shape=entry.shape[::-1], make=partial(_made, entry))


def _made(entry: Entry) -> Tensor:
    return entry.make().T.contiguous()


def with_linears(model: Any) -> Any:
    """The model itself with linears in place of modules of the class Conv1D."""
    if getattr(model.config, "model_type", None) in TURNED:
        from transformers.pytorch_utils import Conv1D

        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Conv1D):
                    setattr(module, name, _linear(child))
    return model


def _linear(conv: Any) -> nn.Linear:
    import torch

    inputs, outputs = conv.weight.shape
    linear = torch.nn.Linear(inputs, outputs, device="meta")
    linear.weight = torch.nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear
