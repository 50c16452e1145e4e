"""Reads what pack.py wrote: the grid of a packed linear, and its integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.models.model_folder import DTYPES, SafetensorsFiles
from epmq_cli.quantize.formats.int import GridSpec, QuantizedWeight

PACKED = ".weight_packed"


def grid_of(folder: Path, quantization: Any, name: str) -> GridSpec | None:
    """The grid of a linear by the quantization_config of config.json; None where it is dense. CheckpointError where
    epmq did not write that.

    How the grid was searched for is not in a checkpoint; `search` says minmax.
    """
    try:
        for group in quantization["config_groups"].values():
            if name not in quantization["ignore"] and {"Linear", name} & set(group["targets"]):
                weights = group["weights"]
                size = -1 if weights["group_size"] is None else weights["group_size"]
                return GridSpec(weights["num_bits"], size, weights["symmetric"], "minmax")
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config that epmq does not write; give the checkpoint folder "
            "that epmq run wrote"
        ) from error
    return None


def unpacked_linear(
    files: SafetensorsFiles, name: str, spec: GridSpec, shape: torch.Size, device: torch.device
) -> QuantizedWeight:
    """The weight (out, in) that `packed_linear` packed, on a device; CheckpointError where its tensors do not fit."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    try:
        values = unpack_from_int32(files.tensor(f"{name}{PACKED}"), spec.bits, shape)
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
        raise CheckpointError(f"the tensors of {name} are not those that config.json describes; see epmq verify")
    return QuantizedWeight(values.to(device), scale, zero, spec, dtype)
