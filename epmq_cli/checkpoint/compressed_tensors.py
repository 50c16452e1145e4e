"""`pack=compressed_tensors`: integers as pack-quantized, FP8 as float-quantized, which transformers loads without
epmq (https://github.com/vllm-project/compressed-tensors).

vLLM 0.32 was tested on a CPU with decoders, BERT and CLIP. It loads unquantized checkpoints and 4 bits, in groups of
32, 64 or 128 inputs or with one scale per row, symmetric or not. It has no CPU kernels for 3, 8 and mixed bits. Its
sources have kernels for 8 bits (Marlin) and for all widths (Humming) on CUDA only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from epmq_cli.checkpoint.exporter import (
    ExpectedTensor,
    equal_to,
    foreign_config,
    scale_check,
    unfit,
    words,
)
from epmq_cli.config.schema import OpenClipPack
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import Tensors, dtype_of
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.store.safetensors_writer import Entry, of

if TYPE_CHECKING:
    from torch import Tensor, nn

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class CompressedTensorsExporter(OpenClipPack):
    """`pack=compressed_tensors`. Weights that are not quantized are stored dense."""

    packs: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    requires: ClassVar[tuple[str, ...]] = ()

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """See exporter.py."""
        if len(formats) > 1 and not family.mixes_formats:
            names = " and ".join(format.name for format in formats)
            raise ConfigError(
                f"transformers cannot load this family with two formats in one checkpoint, got {names}; use one "
                "format, such as bits=4, or pack=dense"
            )
        if any(format.zero_points == "real" for format in formats):
            raise ConfigError(
                "pack=compressed_tensors stores whole zero points, and those of this quantizer are real numbers; use "
                "quant.zero_point=integer or pack=dense"
            )

    def check_linears(
        self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[NumberFormat]
    ) -> None:
        """See exporter.py."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py."""
        scale = weight.grid.scale
        entry = Entry(f"{name}.weight_scale", weight.dtype, tuple(scale.shape), lambda: scale.to(weight.dtype))
        codes = [of(f"{name}.weight", weight.codes)] if is_fp8(weight.format) else _packed_codes(name, weight)
        return [*codes, entry]

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py. One group if all linears have the same format, else one for each.

        `dequantize` makes transformers dequantize while it loads. Zero points and FP8 always need it:
        transformers fills tensors that the files lack, such as those of a pooler, with random numbers, which torch does
        not draw in FP8. With several formats it must stay off, because transformers would use the first one for all.
        """
        formats = {name: weight.format for name, weight in weights.items()}
        if not formats:
            return {}
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        kinds = sorted(set(formats.values()), key=lambda format: format.bits)
        names = list(dict.fromkeys(_compression(format) for format in kinds))
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(kinds) == 1 else [name for name in linears if formats.get(name) == format],
                "weights": _weights_entry(format),
                **({"format": _compression(format)} if len(names) > 1 else {}),
            }
            for index, format in enumerate(kinds)
        }
        config = {
            "quant_method": METHOD,
            "format": "mixed-precision" if len(names) > 1 else names[0],
            "quantization_status": "compressed",
            "ignore": [name for name in linears if name not in formats],
            "config_groups": groups,
        }
        eager = len(kinds) == 1 and (dequantize or kinds[0].zero_points != "none" or is_fp8(kinds[0]))
        return {**config, "dequantize": True} if eager else config

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """See exporter.py."""
        return {}


def is_fp8(format: NumberFormat) -> bool:
    """Whether codes are stored as they are, in FP8; integers are packed."""
    return isinstance(format, Fp8Format)


def _packed_codes(name: str, weight: QuantizedWeight) -> list[Entry]:
    """Integers and their zero points, packed into int32."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, codes, zero = weight.format.bits, weight.codes, weight.grid.zero
    shape = (len(codes), words(codes.shape[1], bits))
    entries = [
        Entry(f"{name}.weight_packed", torch.int32, shape, lambda: pack_to_int32(codes.cpu(), bits)),
        of(f"{name}.weight_shape", torch.tensor(codes.shape)),
    ]
    if zero is not None:
        points = pack_to_int32(zero.to(torch.int8).cpu(), bits, packed_dim=0).contiguous()
        entries.append(of(f"{name}.weight_zero_point", points))
    return entries


def _compression(format: NumberFormat) -> str:
    """The name of a format's storage in compressed-tensors."""
    return "float-quantized" if is_fp8(format) else "pack-quantized"


def _weights_entry(format: NumberFormat) -> dict[str, Any]:
    channel = format.group_size == -1
    return {
        "num_bits": format.bits,
        "type": "float" if is_fp8(format) else "int",
        "symmetric": format.zero_points == "none",
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else format.group_size,
        "dynamic": False,
    }


def _described(weights: Mapping[str, Any]) -> NumberFormat:
    """The format that the weights entry of a config group describes."""
    size = -1 if weights["group_size"] is None else weights["group_size"]
    kind = (weights["type"], weights["num_bits"], weights["symmetric"])
    if kind == ("float", 8, True):
        return Fp8Format(size)
    if weights["type"] != "int" or not isinstance(weights["symmetric"], bool):
        raise ConfigError(f"{kind} is not a format of epmq")
    return IntFormat(weights["num_bits"], size, "none" if weights["symmetric"] else "whole")


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """Linears as the `quantization` config of `folder` groups them."""

    folder: Path
    quantization: Mapping[str, Any]

    scale: ClassVar[str] = ".weight_scale"
    plain: ClassVar[bool] = True

    def format_of(self, name: str) -> NumberFormat | None:
        """See exporter.py."""
        try:
            for group in self.quantization["config_groups"].values():
                if name not in self.quantization["ignore"] and {"Linear", name} & set(group["targets"]):
                    return _described(group["weights"])
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise foreign_config(self.folder) from error
        return None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py."""
        format = self._format(name)
        rows, columns = shape
        groups = ceil(columns / group_columns(format, columns))
        scales = {f"{name}.weight_scale": ExpectedTensor((rows, groups), check=scale_check(format, signed))}
        if is_fp8(format):
            return {f"{name}.weight": ExpectedTensor((rows, columns), "F8_E4M3"), **scales}
        tensors = {
            f"{name}.weight_packed": ExpectedTensor((rows, words(columns, format.bits)), "I32"),
            f"{name}.weight_shape": ExpectedTensor((2,), "I64", partial(equal_to, [rows, columns])),
        }
        if format.zero_points != "none":
            tensors[f"{name}.weight_zero_point"] = ExpectedTensor((words(rows, format.bits), groups), "I32")
        return {**tensors, **scales}

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """See exporter.py."""
        format = self._format(name)
        try:
            scale = files.tensor(f"{name}.weight_scale").to(device, torch.float32)
            if is_fp8(format):
                codes, zero = files.tensor(f"{name}.weight"), None
            else:
                codes, zero = _unpacked(files, name, format, shape, scale.shape)
            fits = codes.shape == shape and scale.shape == (shape[0], shape[1] // group_columns(format, shape[1]))
            fits = fits and codes.dtype == format.storage and (zero is None or zero.shape == scale.shape)
            dtype = dtype_of(files.infos[f"{name}.weight_scale"].dtype)
        except (KeyError, RuntimeError, ValueError, IndexError):
            fits = False
        if not fits:
            raise unfit(name)
        grid = Grid(scale, None if zero is None else zero.to(device, torch.float32).contiguous())
        return QuantizedWeight(codes.to(device), grid, format, dtype)

    def _format(self, name: str) -> NumberFormat:
        format = self.format_of(name)
        if format is None:
            raise unfit(name)
        return format


def _unpacked(
    files: Tensors, name: str, format: NumberFormat, shape: torch.Size, groups: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Integers (out, in) and their zero points (out, groups); None without zero points."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(files.tensor(f"{name}.weight_packed"), format.bits, shape)
    if format.zero_points == "none":
        return codes, None
    # along rows: compressed-tensors 0.20 cannot view a single word of them in bytes
    points = files.tensor(f"{name}.weight_zero_point").T.clone(memory_format=torch.contiguous_format)
    return codes, unpack_from_int32(points, format.bits, torch.Size(reversed(groups))).T


def layout(folder: Path, quantization: Mapping[str, Any]) -> CompressedTensorsLayout:
    """The layout that a quantization_config of config.json describes."""
    return CompressedTensorsLayout(folder, quantization)
