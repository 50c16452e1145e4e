"""A checkpoint as a model of transformers whose packed linears stay packed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.pretrained import from_folder
from epmq_cli.checkpoint.reader import SafetensorsFiles, read_json
from epmq_cli.config import KERNELS, device_of
from epmq_cli.errors import CheckpointError, check_choice
from epmq_cli.inference.int4 import Int4Linear, obstacle

PACKED = ".weight_packed"


@dataclass(frozen=True)
class _Stored:
    """A packed weight on the device it goes to: integers int8 (out, in), scale and zero (out, groups)."""

    bits: int
    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def dense(self) -> Tensor:
        """(out, in), rounded to the type of the scales as transformers does."""
        rows, groups = self.scale.shape
        values = self.values.to(self.scale.dtype).reshape(rows, groups, -1)
        if self.zero is not None:
            values = values - self.zero.to(self.scale.dtype)[:, :, None]
        return (values * self.scale[:, :, None]).reshape(rows, -1)


def load(
    checkpoint: str | Path, device: str = "auto", kernel: str = "auto", dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a checkpoint folder that epmq wrote, ready to be called.

    `device`: auto, cpu, cuda or cuda:<index>. `dtype` of all that is not packed and of activations between linears:
    unless given float32 on the CPU, bfloat16 on a GPU. `kernel`: `int4` multiplies with packed weights, and is refused
    where a linear does not allow that; `dequantize` makes them dense; `auto` takes int4 for every linear that allows
    it. Tensors are read one by one, and no packed weight is ever dense under int4. CheckpointError: no such checkpoint.
    """
    check_choice("kernel", kernel, KERNELS)
    folder, where = Path(checkpoint), device_of(device)
    config = model_config(folder)
    files = SafetensorsFiles(folder, "checkpoint")
    packed = {name.removesuffix(PACKED) for name in files.infos if name.endswith(PACKED)}
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    with _parameters_on_meta():
        model = blank_model(folder, config, files)
    for name in sorted(packed):
        _replace(model, name, _linear(files, name, _bits(folder, name), where, dtype, kernel))
    for name in files.infos:
        if name.rpartition(".")[0] not in packed:
            _set(model, name, files.tensor(name), where, dtype)
    any_model: Any = model
    any_model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"{folder} has no tensor {missing[0]}; run epmq run again")
    model.to(where)
    return model.eval().requires_grad_(False)


def kernels(model: nn.Module) -> dict[str, int]:
    """How many linears of a model are packed, and how many are dense."""
    found = {"int4": 0, "dense": 0}
    for module in model.modules():
        found["int4"] += isinstance(module, Int4Linear)
        found["dense"] += isinstance(module, nn.Linear)
    return found


def model_config(folder: Path) -> Any:
    """The config of a checkpoint's model as transformers has it, without how it is quantized."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint; give the checkpoint folder that epmq run wrote")
    config = from_folder(AutoConfig, folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def blank_model(folder: Path, config: Any, files: SafetensorsFiles) -> nn.Module:
    """The model that config.json names, as it is made, without a pooler where the checkpoint has none."""
    from transformers import PreTrainedModel

    names = read_json(folder, "config.json", "checkpoint").get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    found = getattr(importlib.import_module("transformers"), name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise CheckpointError(f"{folder / 'config.json'} names {name}, which transformers does not have")
    poolerless = "add_pooling_layer" in inspect.signature(found).parameters and not any(
        name.startswith("pooler.") for name in files.infos
    )
    model: nn.Module = found(config, add_pooling_layer=False) if poolerless else found(config)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers, such as rotary frequencies, are made as ever."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    setattr(nn.Module, register.__name__, without_memory)
    try:
        yield
    finally:
        setattr(nn.Module, register.__name__, register)


def _bits(folder: Path, name: str) -> int:
    """The width of a packed linear, from config.json."""
    entry = read_json(folder, "config.json", "checkpoint")["quantization_config"]
    for group in entry["config_groups"].values():
        if "Linear" in group["targets"] or name in group["targets"]:
            return int(group["weights"]["num_bits"])
    raise CheckpointError(f"{folder / 'config.json'} does not say how {name} is packed; run epmq run again")


def _linear(
    files: SafetensorsFiles, name: str, bits: int, device: torch.device, dtype: torch.dtype, kernel: str
) -> nn.Module:
    """The module that stands for a packed linear."""
    bias = files.tensor(f"{name}.bias").to(device, dtype) if f"{name}.bias" in files.infos else None
    stored = _stored(files, name, bits, device)
    rows, columns = stored.values.shape
    reason = obstacle(rows, columns, bits, columns // stored.scale.shape[1], device)
    if kernel == "int4" and reason is not None:
        raise CheckpointError(f"{name} cannot run on int4: {reason}; use kernel auto or dequantize")
    if kernel != "dequantize" and reason is None:
        return Int4Linear(stored.values, stored.scale, stored.zero, bias)
    with torch.device("meta"):
        dense = nn.Linear(columns, rows, bias=bias is not None)
    dense.weight = nn.Parameter(stored.dense().to(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


def _stored(files: SafetensorsFiles, name: str, bits: int, device: torch.device) -> _Stored:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(files.tensor(f"{name}.weight_shape").tolist())
    scale = files.tensor(f"{name}.weight_scale").to(device)
    values = unpack_from_int32(files.tensor(f"{name}{PACKED}"), bits, shape).to(device)
    zero = None
    if f"{name}.weight_zero_point" in files.infos:
        points = files.tensor(f"{name}.weight_zero_point")
        zero = unpack_from_int32(points, bits, torch.Size(scale.shape), packed_dim=0).to(device)
    return _Stored(bits, values, scale, zero)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent).register_module(own, module)


def _set(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a tensor in the place of the model's own."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    value = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    kept: Mapping[str, Any] = module._buffers
    if own in kept:
        module._buffers[own] = value
    else:
        module._parameters[own] = nn.Parameter(value, requires_grad=False)
