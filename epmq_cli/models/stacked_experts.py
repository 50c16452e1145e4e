"""The experts of Llama 4, whose files and modules hold all of a block in two tensors: (experts, in, out).

To the rest of epmq each matrix of an expert is a linear with a weight (out, in), as in files of other mixtures. Tensors
are taken apart when they are read (`apart`) and stacked when dense ones are written (`stacked`). Packed experts keep a
tensor for each linear, which is what transformers and vLLM read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.models.conv1d import Named
from epmq_cli.models.headers import TensorInfo
from epmq_cli.models.mixtures import EXPERTS, LINEARS

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_cli.store.safetensors_writer import Entry

MODEL_TYPES = ("llama4", "llama4_text")
GATE, UP, DOWN = LINEARS
STACK = re.compile(rf"(.*\.{EXPERTS})\.(gate_up_proj|{DOWN})")
WEIGHT = re.compile(rf"(.*\.{EXPERTS})\.(\d+)\.({GATE}|{UP}|{DOWN})\.weight")
PARTS = {"gate_up_proj": (GATE, UP), DOWN: (DOWN,)}
"""The linears of an expert that a tensor holds, side by side."""


def is_stacked(config: Mapping[str, Any]) -> bool:
    """Whether the files of models with this config.json hold all experts of a block in one tensor. The config may be
    damaged."""
    return config.get("model_type") in MODEL_TYPES


@dataclass(frozen=True)
class _Place:
    """Where a linear is: the stack, the number of the expert, and its columns (in, out)."""

    stack: str
    expert: int
    start: int
    end: int


def apart_infos(config: Mapping[str, Any], infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The headers of the tensors of a model with this config.json, one for each linear of an expert."""
    return _apart(infos)[0] if is_stacked(config) else infos


def apart(config: Mapping[str, Any], tensors: Named) -> Named:
    """The stored tensors of a model with this config.json, one for each linear of an expert."""
    return Apart(tensors) if is_stacked(config) else tensors


class Apart:
    """The tensors of a model in files, with a weight (out, in) for each linear of an expert."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors
        self.infos, self._places = _apart(tensors.infos)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name. Of a stack in a safetensors file, only the expert is read."""
        place = self._places.get(name)
        if place is None:
            return self._tensors.tensor(name)
        row = getattr(self._tensors, "row", None)
        expert = row(place.stack, place.expert) if row else self._tensors.tensor(place.stack)[place.expert]
        weight: Tensor = expert[:, place.start : place.end].T.contiguous()
        return weight


def _apart(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, _Place]]:
    own, places = dict[str, TensorInfo](), dict[str, _Place]()
    for name, info in infos.items():
        match = STACK.fullmatch(name)
        if match is None or len(info.shape) != 3:
            own[name] = info
            continue
        experts, inputs, outputs = info.shape
        parts = PARTS[match[2]]
        width = outputs // len(parts)
        for expert in range(experts):
            for number, part in enumerate(parts):
                linear = f"{match[1]}.{expert}.{part}.weight"
                own[linear] = replace(info, shape=(width, inputs))
                places[linear] = _Place(name, expert, number * width, (number + 1) * width)
    return own, places


def stacked(model_type: str | None, entries: Iterable[Entry]) -> list[Entry]:
    """The tensors of a model as its files hold them. `entries`: with a weight (out, in) for each linear of an expert,
    where it is dense."""
    entries = list(entries)
    if model_type not in MODEL_TYPES:
        return entries
    linears = {match.groups(): entry for entry in entries if (match := WEIGHT.fullmatch(entry.name))}
    rest = [entry for entry in entries if not WEIGHT.fullmatch(entry.name)]
    numbers: dict[str, list[str]] = {}
    for experts, number, part in linears:
        numbers.setdefault(experts, []).extend([number] if part == DOWN else [])
    for experts, own in numbers.items():
        for name, parts in PARTS.items():
            rows = [[linears[experts, number, part] for part in parts] for number in sorted(own, key=int)]
            rest.append(_stack(f"{experts}.{name}", rows))
    return rest


def _stack(name: str, rows: list[list[Entry]]) -> Entry:
    """The tensor of all experts. `rows`: the linears of each that stand side by side."""
    first = rows[0][0]
    shape = (len(rows), first.shape[1], sum(entry.shape[0] for entry in rows[0]))
    return replace(first, name=name, shape=shape, make=partial(_made, rows))


def _made(rows: list[list[Entry]]) -> Tensor:
    import torch

    return torch.stack([torch.cat([entry.make() for entry in row]).T for row in rows]).contiguous()
