"""`pack=compressed_tensors`: the format pack-quantized of compressed-tensors, which transformers loads with nothing of
ours installed (https://github.com/vllm-project/compressed-tensors).

vLLM 0.32 was tried on a CPU with decoders, BERT and CLIP. It loads unquantized checkpoints and 4 bits, in groups of 32,
64 or 128 inputs or with one scale per row, symmetric or not. It refuses 3, 8 and mixed bits there: no kernel takes
them. Its sources have kernels for 8 bits (Marlin) and for all widths (Humming) on CUDA only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from epmq_cli.checkpoint.exporter import (
    ExpectedTensor,
    equal_to,
    foreign_config,
    positive_scale,
    signed_scale,
    unfit,
    words,
)
from epmq_cli.config.schema import Pack
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import DTYPES, Tensors
from epmq_cli.quantize.formats.int import GridSpec, QuantizedWeight
from epmq_cli.store.safetensors_writer import Entry, of

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class CompressedTensorsExporter(Pack):
    """`pack=compressed_tensors`. Weights that are not quantized are stored dense."""

    packs: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, family: Family, formats: Collection[GridSpec]) -> None:
        """See exporter.py."""

    def check_linears(self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[GridSpec]) -> None:
        """See exporter.py."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        rows, columns = weight.values.shape
        bits, groups = weight.spec.bits, weight.scale.shape[1]
        shape = (rows, words(columns, bits))
        entries = [
            Entry(f"{name}.weight_packed", torch.int32, shape, lambda: pack_to_int32(weight.values.cpu(), bits)),
            Entry(f"{name}.weight_scale", weight.dtype, (rows, groups), lambda: weight.scale.to(weight.dtype)),
            of(f"{name}.weight_shape", torch.tensor([rows, columns])),
        ]
        if not weight.spec.symmetric:
            zero = weight.zero.to(torch.int8).cpu()
            entries.append(of(f"{name}.weight_zero_point", pack_to_int32(zero, bits, packed_dim=0).contiguous()))
        return entries

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py. One group if all linears have the same format, else one for each.

        `dequantize` makes transformers dequantize while it loads; it needs that for asymmetric grids in any case. It
        must not do so with several widths, since it would take the first for all.
        """
        specs = {name: weight.spec for name, weight in weights.items()}
        if not specs:
            return {}
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        kinds = sorted(set(specs.values()), key=lambda spec: spec.bits)
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(kinds) == 1 else [name for name in linears if specs.get(name) == spec],
                "weights": _weights_entry(spec),
            }
            for index, spec in enumerate(kinds)
        }
        config = {
            "quant_method": METHOD,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [name for name in linears if name not in specs],
            "config_groups": groups,
        }
        asked = len(kinds) == 1 and (dequantize or not kinds[0].symmetric)
        return {**config, "dequantize": True} if asked else config

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """See exporter.py."""
        return {}


def _weights_entry(spec: GridSpec) -> dict[str, Any]:
    channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else spec.group_size,
        "dynamic": False,
    }


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """Linears as the `quantization` config of `folder` groups them."""

    folder: Path
    quantization: Mapping[str, Any]

    codes: ClassVar[str] = ".weight_packed"
    plain: ClassVar[bool] = True

    def format_of(self, name: str) -> GridSpec | None:
        """See exporter.py."""
        try:
            for group in self.quantization["config_groups"].values():
                if name not in self.quantization["ignore"] and {"Linear", name} & set(group["targets"]):
                    weights = group["weights"]
                    size = -1 if weights["group_size"] is None else weights["group_size"]
                    return GridSpec(weights["num_bits"], size, weights["symmetric"], "minmax")
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise foreign_config(self.folder) from error
        return None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py."""
        spec = self._spec(name)
        rows, columns = shape
        groups = ceil(columns / spec.columns(columns))
        scale = signed_scale if signed and spec.symmetric else positive_scale
        tensors = {
            f"{name}.weight_packed": ExpectedTensor((rows, words(columns, spec.bits)), "I32"),
            f"{name}.weight_scale": ExpectedTensor((rows, groups), check=scale),
            f"{name}.weight_shape": ExpectedTensor((2,), "I64", partial(equal_to, [rows, columns])),
        }
        if not spec.symmetric:
            tensors[f"{name}.weight_zero_point"] = ExpectedTensor((words(rows, spec.bits), groups), "I32")
        return tensors

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """See exporter.py."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        spec = self._spec(name)
        try:
            values = unpack_from_int32(files.tensor(f"{name}.weight_packed"), spec.bits, shape)
            scale = files.tensor(f"{name}.weight_scale").to(device, torch.float32)
            zero = torch.zeros_like(scale)
            if not spec.symmetric:
                # along rows: compressed-tensors 0.20 cannot view a single word of them in bytes
                points = files.tensor(f"{name}.weight_zero_point").T.clone(memory_format=torch.contiguous_format)
                zero = unpack_from_int32(points, spec.bits, scale.T.shape).T.to(device, torch.float32).contiguous()
            fits = values.shape == shape and scale.shape == (shape[0], shape[1] // spec.columns(shape[1])) == zero.shape
            dtype = DTYPES[files.infos[f"{name}.weight_scale"].dtype]
        except (KeyError, RuntimeError, ValueError, IndexError):
            fits = False
        if not fits:
            raise unfit(name)
        return QuantizedWeight(values.to(device), scale, zero, spec, dtype)

    def _spec(self, name: str) -> GridSpec:
        spec = self.format_of(name)
        if spec is None:
            raise unfit(name)
        return spec


def layout(folder: Path, quantization: Mapping[str, Any]) -> CompressedTensorsLayout:
    """The layout that a quantization_config of config.json describes."""
    return CompressedTensorsLayout(folder, quantization)
