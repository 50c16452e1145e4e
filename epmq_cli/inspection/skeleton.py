"""A model without weights that has the modules and shapes of a file's header, for families to name its steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

META = torch.device("meta")


class Skeleton(nn.Module):
    """A module of a header. Modules that the header lacks are empty."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module of this name."""
        try:
            return super().get_submodule(target)
        except AttributeError:
            return Skeleton()


class _Settings(SimpleNamespace):
    """The settings of a config; those that it lacks are `cls`, the only one that families read here."""

    def __getattr__(self, name: str) -> Any:
        return "cls"


def skeleton(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> nn.Module:
    """The modules of tensors of these names and shapes. A module with a matrix is a linear."""
    names = config.get("architectures") or ["model"]
    kind = names[0] if isinstance(names, list) and isinstance(names[0], str) and names[0].isidentifier() else "model"
    model: nn.Module = type(kind, (Skeleton,), {})()
    settings: Any = _Settings(**{str(key): value for key, value in config.items()})
    model.config = settings
    matrices_first = sorted(shapes.items(), key=lambda entry: len(entry[1]) != 2)  # a linear is made by its weight
    for name, shape in matrices_first:
        *path, module, tensor = ["", *name.split(".")] if "." not in name else name.split(".")
        parent = _inside(model, [part for part in path if part])
        if not module:
            parent.register_parameter(tensor, _blank(shape))
            continue
        own = parent._modules.get(module)
        if tensor == "weight" and len(shape) == 2 and own is None:
            own = nn.Linear(shape[1], shape[0], bias=f"{name.removesuffix('weight')}bias" in shapes, device=META)
        elif own is None:
            own = Skeleton()
        parent._modules[module] = own
        if tensor not in own._parameters:
            own.register_parameter(tensor, _blank(shape))
    return model


def _inside(model: nn.Module, path: list[str]) -> nn.Module:
    for part in path:
        own = model._modules.get(part)
        if own is None:
            own = Skeleton()
            model._modules[part] = own
        model = own
    return model


def _blank(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=META), requires_grad=False)
