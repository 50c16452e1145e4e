"""Loads a checkpoint as a model of transformers; its quantized linears can stay packed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.checkpoint.calibrated_scales import expected_cache
from epmq_cli.checkpoint.exact_linear import ExactLinear
from epmq_cli.checkpoint.exporter import Layout
from epmq_cli.checkpoint.int4_linear import Int4Linear, obstacle
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.config.instantiate import device_of
from epmq_cli.config.schema import KERNELS
from epmq_cli.config.validate import check_choice
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.models.conv1d import TURNED
from epmq_cli.models.linears import in_linears
from epmq_cli.models.mixtures import MIXTURES
from epmq_cli.models.model_folder import Tensors, check_counts, model_files, read_json
from epmq_cli.models.pretrained import DENSE_ONLY, from_folder
from epmq_cli.quantize.formats.format import NumberFormat

if TYPE_CHECKING:
    from torch import Tensor, nn

GENERATION = "generation_config.json"


def load(
    checkpoint: str | Path, device: str = "auto", kernel: str = "auto", dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a checkpoint folder that epmq wrote, in evaluation mode.

    `device`: auto, cpu, cuda or cuda:<index>. `dtype`: the type of dense weights and of activations; float32 on the CPU
    and bfloat16 on a GPU by default. `kernel`: `auto` multiplies with packed weights if the int4 kernel supports them,
    and dequantizes the others, such as FP8; `int4` requires that the kernel supports all quantized linears; `exact`
    keeps all of them packed and dequantizes each at every call, which gives the outputs of `dequantize`, where the
    kernel rounds inputs to bfloat16; `dequantize` makes all weights dense. Tensors are read one by one. Weights that
    stay packed are never dense in memory, but for one at a time with `exact`. ConfigError if the kernel cannot be used.
    CheckpointError if epmq did not write the folder.
    """
    from transformers import GenerationConfig

    check_choice("kernel", kernel, KERNELS)
    folder, where = Path(checkpoint), device_of(device)
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint; give the checkpoint folder that epmq run wrote")
    files = model_files(folder, "checkpoint")
    config = model_config(folder, files)
    with torch.nn.modules.module.register_module_parameter_registration_hook(_without_memory):  # type: ignore[arg-type]  # it may return one
        model = blank_model(folder, config, files)
    layout = layout_of(folder)
    formats = quantized_linears(folder, model, files, layout)
    shapes = {name: _weight(model, name).shape for name in formats}
    obstacles = {name: obstacle(format, shapes[name], where) for name, format in formats.items()}
    if kernel == "int4":
        refuse(obstacles)
    dense = {}
    for name, reason in obstacles.items():
        weight = layout.read(files, name, shapes[name], where)
        packed = _packed_class(kernel, reason)
        if packed is not None:
            model.set_submodule(name, packed(weight, model.get_submodule(name).bias))  # type: ignore[arg-type]
        else:
            dense[f"{name}.weight"] = weight.dequantize().to(dtype)
    stored = {part for name, shape in shapes.items() for part in layout.expected(name, shape, signed=True)}
    stored |= expected_cache(folder, model).keys()
    for name in files.infos:
        if name not in stored:
            tensor = files.tensor(name)
            dense[name] = tensor.to(where, dtype if tensor.is_floating_point() else tensor.dtype)
    _fill(folder, model, dense)
    if (folder / GENERATION).is_file():
        model.generation_config = from_folder(GenerationConfig, folder)
    return model.to(where).eval().requires_grad_(False)


def needs_own_loader(folder: Path) -> bool:
    """Whether transformers may not load a checkpoint's packed weights: those of `DENSE_ONLY` and of GPT-2, and experts
    of mixtures, which it does not load in all formats."""
    return read_json(folder, "config.json", "checkpoint").get("model_type") in (*MIXTURES, *DENSE_ONLY, *TURNED)


def _packed_class(kernel: str, obstacle: str | None) -> type[Int4Linear | ExactLinear] | None:
    """The class of a linear that stays packed; None if it becomes dense. `obstacle`: of the int4 kernel."""
    if kernel == "exact":
        return ExactLinear
    return Int4Linear if kernel != "dequantize" and obstacle is None else None


def refuse(obstacles: Mapping[str, str | None]) -> None:
    """ConfigError if no linear is quantized, or if the int4 kernel does not support one of them (`obstacle`)."""
    if not obstacles:
        raise ConfigError("kernel=int4 needs quantized linears, but the model has none; use kernel=auto")
    for name, reason in obstacles.items():
        if reason is not None:
            raise ConfigError(f"kernel=int4 cannot take {name}: {reason}; use kernel=auto, which dequantizes it")


def kernels(model: nn.Module) -> dict[str, int]:
    """The number of packed linears of each kind, and of dense ones."""
    counts = {"int4": 0, "exact": 0, "dense": 0}
    for module in model.modules():
        counts["int4"] += isinstance(module, Int4Linear)
        counts["exact"] += isinstance(module, ExactLinear)
        counts["dense"] += isinstance(module, torch.nn.Linear)
    return counts


def model_config(folder: Path, files: Tensors) -> Any:
    """The model config of a checkpoint, without its quantization_config."""
    from transformers import AutoConfig

    check_counts(folder / "config.json", "checkpoint", read_json(folder, "config.json", "checkpoint"), len(files.infos))
    config = from_folder(AutoConfig, folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def blank_model(folder: Path, config: Any, files: Tensors) -> nn.Module:
    """The model that config.json names, with its initial weights; without a pooler if the checkpoint has none."""
    from transformers import PreTrainedModel

    names = read_json(folder, "config.json", "checkpoint").get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    cls = getattr(importlib.import_module("transformers"), name, None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise CheckpointError(f"{folder / 'config.json'} names {name}, which transformers does not have")
    model: nn.Module = cls(config)
    optional = "add_pooling_layer" in inspect.signature(cls).parameters
    if optional and _has_pooler(dict(model.named_parameters())) and not _has_pooler(files.infos):
        model = cls(config, add_pooling_layer=False)
    linears: nn.Module = in_linears(model)
    return linears


def _has_pooler(tensors: Iterable[str]) -> bool:
    """Whether a model with tensors of these names has a pooler that was trained; that of Swin is a mean."""
    return any(name.startswith("pooler.") for name in tensors)


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter on the meta device. Buffers, such as rotary frequencies, keep their memory."""
    return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def quantized_linears(folder: Path, model: nn.Module, files: Tensors, layout: Layout) -> dict[str, NumberFormat]:
    """The number format of each quantized linear."""
    formats = {}
    for name, module in model.named_modules():
        if layout.scale and isinstance(module, torch.nn.Linear) and f"{name}{layout.scale}" in files.infos:
            format = layout.format_of(name)
            if format is None:
                raise CheckpointError(
                    f"{folder / 'config.json'} does not describe the packing of {name}; run epmq run again"
                )
            formats[name] = format
    return formats


def _fill(folder: Path, model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Assigns tensors to the parameters of a model; CheckpointError if they do not fit, or one is missing."""
    try:
        keys = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().removesuffix(".")  # a shape
        raise CheckpointError(f"{folder} does not fit its config.json ({reason}); see epmq verify") from error
    model.tie_weights(missing_keys=set(keys.missing_keys))
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"{folder} has no tensor {missing[0]}; run epmq run again")
    if keys.unexpected_keys:
        raise CheckpointError(f"{folder} has a tensor that its model lacks: {keys.unexpected_keys[0]}; see epmq verify")
