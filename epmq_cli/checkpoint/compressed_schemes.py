"""Number formats as compressed-tensors' schemes, the groups of its config
(https://github.com/vllm-project/compressed-tensors, quantization/quant_scheme.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import BLOCK, Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.microscaling import MxFormat, Nvfp4Format
from epmq_cli.quantize.formats.names import FIXED

SCALE_TYPES: dict[type[Any], str] = {MxFormat: "torch.uint8", Nvfp4Format: "torch.float8_e4m3fn"}
"""The types of scales that do not have the type of the checkpoint."""
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": True}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "int8": {**TOKEN, "type": "int"},
    "fp8": {**TOKEN, "type": "float"},
    "fp8_static": TENSOR,
    "fp8_group": {**TOKEN, "type": "float", "strategy": "group", "group_size": BLOCK},
    "nvfp4": {
        **MX,
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
        "observer": "static_minmax",
    },
    "mxfp4": {**MX, "num_bits": 4, "scale_dtype": "torch.uint8"},
    "mxfp8": {**MX, "num_bits": 8, "scale_dtype": "torch.uint8"},
}


def storage_name(format: NumberFormat) -> str:
    """compressed-tensors' name of the storage of a format. ConfigError if it has none."""
    if isinstance(format, MxFormat):
        return "mxfp8-quantized" if format.bits == 8 else f"mxfp{format.bits}-pack-quantized"
    if isinstance(format, Nvfp4Format):
        return "nvfp4-pack-quantized"
    if isinstance(format, Fp8Format):
        return "float-quantized"
    if isinstance(format, IntFormat):
        return "pack-quantized" if format.activations == "none" or format.bits < 8 else "int-quantized"
    raise ConfigError(f"pack=compressed_tensors cannot store the format {format.name}; use pack=dense")


def scheme_of(format: NumberFormat) -> dict[str, Any]:
    """The scheme of a format, without its targets."""
    weights = {
        "num_bits": format.bits,
        "type": "int" if isinstance(format, IntFormat) else "float",
        "symmetric": format.zero_points == "none",
        **_groups(format),
        "dynamic": False,
    }
    if type(format) in SCALE_TYPES:
        weights["scale_dtype"] = SCALE_TYPES[type(format)]
    if format.activations == "none":
        return {"weights": weights}
    return {"weights": weights, "input_activations": ACTIVATIONS[format.activations]}


def _groups(format: NumberFormat) -> dict[str, Any]:
    """Which weights share a scale."""
    if format.row_block > 1:
        block = [format.row_block, format.group_size]
        return {"strategy": "block", "group_size": None, "block_structure": block}
    if format.group_size == -1:
        return {"strategy": "channel", "group_size": None}
    grouped = "tensor_group" if isinstance(format, Nvfp4Format) else "group"
    return {"strategy": grouped, "group_size": format.group_size}


def described(scheme: Mapping[str, Any]) -> NumberFormat:
    """The format that a scheme describes. ConfigError, KeyError or TypeError if epmq does not write it."""
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    for format in FIXED.values():
        if {"weights": weights, "input_activations": inputs} == {"input_activations": None, **scheme_of(format)}:
            return format
    size = -1 if weights["group_size"] is None else weights["group_size"]
    kind = (weights["type"], weights["num_bits"], weights["symmetric"])
    if inputs == ACTIVATIONS["int8"] and scheme_of(IntFormat(4, size, "none", "int8"))["weights"] == weights:
        return IntFormat(4, size, "none", "int8")
    if inputs is None and "scale_dtype" not in weights and "block_structure" not in weights:
        if kind == ("float", 8, True):
            return Fp8Format(size)
        if weights["type"] == "int" and isinstance(weights["symmetric"], bool):
            return IntFormat(weights["num_bits"], size, "none" if weights["symmetric"] else "whole")
    raise ConfigError(f"{kind} is not a format of epmq")
