"""Reads quantized linears from a checkpoint that epmq wrote (pack.py): the format of each, and its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.models.model_folder import DTYPES, SafetensorsFiles
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat

SCALE = ".weight_scale"
"""Every quantized linear has this tensor."""


def format_of(folder: Path, quantization: Any, name: str) -> NumberFormat | None:
    """The format of a linear by the quantization_config of config.json; None if it is dense. CheckpointError if epmq
    did not write that."""
    try:
        for group in quantization["config_groups"].values():
            if name not in quantization["ignore"] and {"Linear", name} & set(group["targets"]):
                return _described(group["weights"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config that epmq does not write; give the checkpoint folder "
            "that epmq run wrote"
        ) from error
    return None


def _described(weights: Any) -> NumberFormat:
    """The format that an entry of config_groups describes."""
    size = -1 if weights["group_size"] is None else weights["group_size"]
    kind = (weights["type"], weights["num_bits"], weights["symmetric"])
    if kind == ("float", 8, True):
        return Fp8Format(size)
    if weights["type"] != "int" or not isinstance(weights["symmetric"], bool):
        raise ConfigError(f"{kind} is no format of epmq")
    return IntFormat(weights["num_bits"], size, "none" if weights["symmetric"] else "whole")


def quantized_linear(
    files: SafetensorsFiles, name: str, format: NumberFormat, shape: torch.Size, device: torch.device
) -> QuantizedWeight:
    """The weight (out, in) of a linear, on a device; CheckpointError if its tensors do not fit."""
    try:
        scale = files.tensor(f"{name}{SCALE}").to(device, torch.float32)
        if isinstance(format, Fp8Format):
            codes, zero = files.tensor(f"{name}.weight"), None
        else:
            codes, zero = _unpacked(files, name, format, shape, scale.shape)
        fits = codes.shape == shape and scale.shape == (shape[0], shape[1] // group_columns(format, shape[1]))
        fits = fits and codes.dtype == format.storage and (zero is None or zero.shape == scale.shape)
        dtype = DTYPES[files.infos[f"{name}{SCALE}"].dtype]
    except (KeyError, RuntimeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise CheckpointError(f"the tensors of {name} are not those that config.json describes; see epmq verify")
    grid = Grid(scale, None if zero is None else zero.to(device, torch.float32).contiguous())
    return QuantizedWeight(codes.to(device), grid, format, dtype)


def _unpacked(
    files: SafetensorsFiles, name: str, format: NumberFormat, shape: torch.Size, groups: torch.Size
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Integers (out, in) and their zero points (out, groups), or None without those."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(files.tensor(f"{name}.weight_packed"), format.bits, shape)
    if format.zero_points == "none":
        return codes, None
    # along rows: compressed-tensors 0.20 cannot view a single word of them in bytes
    points = files.tensor(f"{name}.weight_zero_point").T.clone(memory_format=torch.contiguous_format)
    return codes, unpack_from_int32(points, format.bits, torch.Size(reversed(groups))).T
