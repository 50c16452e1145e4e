"""Number formats as compressed-tensors' schemes, the groups of its config
(https://github.com/vllm-project/compressed-tensors, quantization/quant_scheme.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.microscaling import MxFormat, Nvfp4Format
from epmq_cli.quantize.formats.names import FIXED

SCALE_TYPES: dict[type[Any], str] = {MxFormat: "torch.uint8", Nvfp4Format: "torch.float8_e4m3fn"}
"""The types of scales that do not have the type of the checkpoint."""
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": True}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "int8": {**TOKEN, "type": "int"},
    "fp8": {**TOKEN, "type": "float"},
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
        return "pack-quantized" if format.activations == "none" else "int-quantized"
    raise ConfigError(f"pack=compressed_tensors cannot store the format {format.name}; use pack=dense")


def scheme_of(format: NumberFormat) -> dict[str, Any]:
    """The scheme of a format, without its targets."""
    channel = format.group_size == -1
    weights = {
        "num_bits": format.bits,
        "type": "int" if isinstance(format, IntFormat) else "float",
        "symmetric": format.zero_points == "none",
        "strategy": "channel" if channel else "tensor_group" if isinstance(format, Nvfp4Format) else "group",
        "group_size": None if channel else format.group_size,
        "dynamic": False,
    }
    if type(format) in SCALE_TYPES:
        weights["scale_dtype"] = SCALE_TYPES[type(format)]
    if format.activations == "none":
        return {"weights": weights}
    return {"weights": weights, "input_activations": ACTIVATIONS[format.activations]}


def described(scheme: Mapping[str, Any]) -> NumberFormat:
    """The format that a scheme describes. ConfigError, KeyError or TypeError if epmq does not write it."""
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    for format in FIXED.values():
        if {"weights": weights, "input_activations": inputs} == {"input_activations": None, **scheme_of(format)}:
            return format
    size = -1 if weights["group_size"] is None else weights["group_size"]
    kind = (weights["type"], weights["num_bits"], weights["symmetric"])
    if inputs is None and "scale_dtype" not in weights:
        if kind == ("float", 8, True):
            return Fp8Format(size)
        if weights["type"] == "int" and isinstance(weights["symmetric"], bool):
            return IntFormat(weights["num_bits"], size, "none" if weights["symmetric"] else "whole")
    raise ConfigError(f"{kind} is not a format of epmq")
