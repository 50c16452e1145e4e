"""Collects the weights that a walk quantizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.calibrate.progress_file import opened
from epmq_cli.quantize.formats.format import DenseWeight, Grid, QuantizedWeight
from epmq_cli.quantize.formats.names import as_json, from_json

Weight = QuantizedWeight | DenseWeight


class WeightSink(Mapping[str, Weight]):
    """The weights of the blocks' linears by module name, in the order of the walk.

    A weight is in memory until it is moved to a file. Then it is read each time it is looked up; the file is
    memory-mapped, so the system can reclaim the memory.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Weight | Path] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __getitem__(self, name: str) -> Weight:
        weight = self._weights[name]
        return _read(weight, name) if isinstance(weight, Path) else weight

    def add(self, name: str, weight: Weight) -> None:
        """Adds a weight, in memory."""
        self._weights[name] = weight

    def in_memory(self) -> dict[str, Weight]:
        """The weights that are in no file yet."""
        return {name: weight for name, weight in self._weights.items() if not isinstance(weight, Path)}

    def move(self, names: Iterable[str], path: Path) -> None:
        """From now on, reads these weights from a file that contains them."""
        self._weights.update(dict.fromkeys(names, path))


def stored(weights: Mapping[str, Weight]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of quantized weights under their names in a file, and the header that describes each weight.

    The header of a dense weight is None. Its tensor is not included: it is a tensor of the student like any other.
    """
    tensors: dict[str, Tensor] = {}
    headers: dict[str, Any] = {}
    for name, weight in weights.items():
        headers[name] = None
        if isinstance(weight, QuantizedWeight):
            headers[name] = {"format": as_json(weight.format), "dtype": str(weight.dtype).removeprefix("torch.")}
            tensors |= {f"codes.{name}": weight.codes, f"scale.{name}": weight.grid.scale}
            if weight.grid.zero is not None:
                tensors[f"zero.{name}"] = weight.grid.zero
    return tensors, headers


def _read(path: Path, name: str) -> Weight:
    """A weight from its file. RunError if the file is damaged."""
    with opened(path) as (file, header):
        grid = header["weights"][name]
        if grid is None:
            return DenseWeight(file.get_tensor(f"tensor.{name}.weight").float())
        format, dtype = from_json(grid["format"]), getattr(torch, grid["dtype"])
        zero = None if format.zero_points == "none" else file.get_tensor(f"zero.{name}")
        codes, scale = file.get_tensor(f"codes.{name}"), file.get_tensor(f"scale.{name}")
        return QuantizedWeight(codes, Grid(scale, zero), format, dtype)
