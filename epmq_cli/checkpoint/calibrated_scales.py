"""Scales of activations that calibration measures, as compressed-tensors stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.checkpoint.compressed_schemes import TENSOR
from epmq_cli.checkpoint.exporter import ExpectedTensor, positive_scale
from epmq_cli.models.attention import cached_attentions
from epmq_cli.models.model_folder import Tensors, read_json
from epmq_cli.quantize.formats.format import NumberFormat, in_single
from epmq_cli.quantize.formats.fp8 import LARGEST, Fp8Format
from epmq_cli.quantize.formats.microscaling import Nvfp4Format
from epmq_cli.store.safetensors_writer import Entry, of

if TYPE_CHECKING:
    from torch import nn

CACHE = {"kv_cache_scheme": TENSOR}
"""The entry of quantization_config for FP8 keys and values, with a scale for the keys and one for the values of an
attention."""
PARTS = ("k_scale", "v_scale")
SUFFIXES = {"fp8_static": "input_scale", "nvfp4": "input_global_scale"}
"""The tensor with the scale of a linear's inputs, by the format of activations."""


def input_entries(name: str, format: NumberFormat) -> list[Entry]:
    """The tensor that stores the scale of a linear's inputs; none if the format has no such scale."""
    if format.activations not in SUFFIXES:
        return []
    return [of(f"{name}.{SUFFIXES[format.activations]}", torch.tensor([input_scale(format)]))]


def expected_inputs(name: str, format: NumberFormat) -> dict[str, ExpectedTensor]:
    """That tensor as a checkpoint must have it."""
    if format.activations not in SUFFIXES:
        return {}
    return {f"{name}.{SUFFIXES[format.activations]}": ExpectedTensor((1,), "F32", positive_scale)}


def with_input_scale(files: Tensors, name: str, format: NumberFormat) -> NumberFormat:
    """The format of a linear with the stored scale of its inputs."""
    if format.activations not in SUFFIXES:
        return format
    scale = float(files.tensor(f"{name}.{SUFFIXES[format.activations]}"))
    if isinstance(format, Fp8Format):
        return replace(format, input_scale=scale)
    assert isinstance(format, Nvfp4Format)
    return replace(format, input_global_scale=scale)


def cache_scales(ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The scales of cached keys and values, by the names of their tensors.

    `ranges`: the largest key and the largest value of each attention.
    """
    return {
        f"{name}.{part}": in_single(largest / LARGEST) if largest > 0 else 1.0
        for name, both in ranges.items()
        for part, largest in zip(PARTS, both, strict=True)
    }


def expected_cache(folder: Path, model: nn.Module) -> dict[str, ExpectedTensor]:
    """The tensors of these scales in a checkpoint of the model; none if its config.json does not name them."""
    quantization = read_json(folder, "config.json", "checkpoint").get("quantization_config")
    if not isinstance(quantization, dict) or not CACHE.keys() & quantization.keys():
        return {}
    names = [f"{name}.{part}" for name in cached_attentions(model) for part in PARTS]
    return dict.fromkeys(names, ExpectedTensor((1,), "F32", positive_scale))


def input_scale(format: NumberFormat) -> float:
    """The scale of a linear's inputs, of a format that stores one."""
    if isinstance(format, Fp8Format):
        return format.input_scale
    assert isinstance(format, Nvfp4Format)
    return format.input_global_scale
