"""The size of model.gguf, known from shapes before anything is calibrated."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from epmq_cli.checkpoint.gguf import blocks
from epmq_cli.checkpoint.gguf.architectures import architecture_of, rotary_factors
from epmq_cli.checkpoint.gguf.exporter import NAME
from epmq_cli.checkpoint.gguf.write import Stored, byte_shape, dense_kind, header
from epmq_cli.checkpoint.write import untied
from epmq_cli.quantize.formats.format import NumberFormat

if TYPE_CHECKING:
    from torch import nn

ALIGNMENT = 32
"""Each tensor of a file begins at a multiple of these bytes."""


def header_bytes(model: nn.Module, config: Mapping[str, Any], folder: Path) -> int:
    """The bytes before the tensors of a model: metadata, tokens and names. `config`: of config.json; `folder`: of the
    tokenizer."""
    with TemporaryDirectory() as place:
        path = Path(place) / NAME
        tensors = [*_tensors(model, config, (), None, "F32")]
        header(path, architecture_of(config).name, tensors, NAME, 0, (config, folder)).close()
        return path.stat().st_size


def tensor_bytes(
    model: nn.Module, config: Mapping[str, Any], linears: Collection[str], format: NumberFormat | None, dense: str
) -> int:
    """The bytes of the tensors of a model, whose `linears` have a format, or none. `dense`: see GgufFile."""
    tensors = _tensors(model, config, linears, format, dense.upper())
    return sum(math.ceil(math.prod(byte_shape(each)) / ALIGNMENT) * ALIGNMENT for each in tensors)


def _tensors(
    model: nn.Module, config: Mapping[str, Any], linears: Collection[str], format: NumberFormat | None, dense: str
) -> Iterator[Stored]:
    for name, tensor in untied(model).items():
        shape = tuple(tensor.shape)
        packed = format is not None and name.removesuffix(".weight") in linears and len(shape) > 1
        kind = blocks.kind_of(format) if packed and format is not None else dense_kind(shape, dense)
        yield Stored(name, kind, shape, dict)
    if (factors := rotary_factors(config)) is not None:
        yield Stored("rope_freqs.weight", "F32", tuple(factors.shape), dict)
