"""Rounds the inputs of quantized linears as engines do at run time, so that scores contain this rounding.

compressed-tensors computes it, as for a model of transformers that is not dequantized. Kernels of engines differ in
details: those of vLLM for int8 divide the largest input of a token by 127, compressed-tensors by 127.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.checkpoint.calibrated_scales import input_scale, with_input_scale
from epmq_cli.checkpoint.compressed_schemes import ACTIVATIONS
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


def input_formats(folder: Path) -> dict[str, NumberFormat]:
    """The format of each linear of a checkpoint whose inputs engines round, with the stored scale of its inputs."""
    layout, files, formats = layout_of(folder), SafetensorsFiles(folder, "checkpoint"), {}
    for tensor in files.infos if layout.scale else ():
        name = tensor.removesuffix(layout.scale)
        format = layout.format_of(name) if name != tensor else None
        if format is not None and format.activations != "none":
            formats[name] = with_input_scale(files, name, format)
    return formats


def round_inputs(model: nn.Module, formats: Mapping[str, NumberFormat]) -> list[RemovableHandle]:
    """Makes linears round their inputs to the activations of these formats. Removing the handles ends it."""
    return [
        model.get_submodule(name).register_forward_pre_hook(_hook(input_rounding(format)))
        for name, format in formats.items()
    ]


@contextmanager
def rounded_inputs(model: nn.Module, formats: Mapping[str, NumberFormat]) -> Iterator[None]:
    """`round_inputs` inside the context."""
    handles = round_inputs(model, formats)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_rounding(format: NumberFormat) -> Callable[[Tensor], Tensor]:
    """The rounding of inputs (..., in) of a linear with this format; it has activations."""
    from compressed_tensors.quantization import QuantizationArgs

    stored = torch.tensor([input_scale(format)]) if format.activations == "nvfp4" else None
    fixed = torch.tensor([input_scale(format)]) if format.activations == "fp8_static" else None
    return partial(_rounded, QuantizationArgs(**ACTIVATIONS[format.activations]), fixed, stored)


def _rounded(args: Any, scale: Tensor | None, global_scale: Tensor | None, x: Tensor) -> Tensor:
    """The nearest numbers to inputs (..., in) under QuantizationArgs. `scale`: the calibrated one; None to derive one
    from the inputs."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    if x.numel() == 0:
        return x
    rows = x.reshape(1, -1, x.shape[-1])  # with two axes, compressed-tensors takes one scale for all tokens
    scale, global_scale = (None if part is None else part.to(x.device) for part in (scale, global_scale))
    zero = None
    if scale is None:
        scale, zero = compute_dynamic_scales_and_zp(rows, args, None, global_scale)
    rounded: Tensor = fake_quantize(rows, scale, zero, args, global_scale=global_scale)
    return rounded.view(x.shape)


def _hook(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, args: (rounding(args[0]), *args[1:])
