"""`pack=dense`: a plain transformers checkpoint with the quantized weights dequantized, in the stored type.

For engines without kernels for packed weights, and for number formats that no packed checkpoint format holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from epmq_cli.checkpoint.exporter import ExpectedTensor, check_plain_inputs
from epmq_cli.config.schema import OpenClipPack
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import Tensors
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.store.safetensors_writer import Entry

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class DenseExporter(OpenClipPack):
    """`pack=dense`. It stores weights of every format and model, and no format of activations."""

    packs: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """See exporter.py."""
        check_plain_inputs("dense", formats)

    def check_linears(
        self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[NumberFormat]
    ) -> None:
        """See exporter.py."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py. The stored type holds these weights exactly: `dequantize` rounds them to it."""
        shape = tuple(weight.shape)
        return [Entry(f"{name}.weight", weight.dtype, shape, lambda: weight.dequantize().to(weight.dtype))]

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py."""
        return {}

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """See exporter.py."""
        return {}


class DenseLayout:
    """A checkpoint without a quantization_config, such as one of `pack=dense`, `quant=none` or `epmq merge`."""

    scale: ClassVar[str] = ""
    plain: ClassVar[bool] = True

    def format_of(self, name: str) -> NumberFormat | None:
        """See exporter.py."""
        return None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py."""
        return {f"{name}.weight": ExpectedTensor(tuple(shape))}

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> NoReturn:
        """Never called, because `format_of` is None for every linear."""
        raise AssertionError(name)
