"""Writes a checkpoint that transformers and vLLM load with nothing of ours installed: compressed-tensors,
pack-quantized.

The folder appears under its name in one step, when all of its files are on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq_cli.errors import CheckpointError
from epmq_cli.quantize.grid import DenseWeight, GridSpec, QuantizedWeight

HEADS = "heads.safetensors"
RECORD = "epmq.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def packed_linear(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one linear by their names behind the module's."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {
        "weight_packed": pack_to_int32(weight.values.cpu(), weight.spec.bits),
        "weight_scale": weight.scale.to(weight.dtype).cpu(),
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if not weight.spec.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(weight.zero.to(torch.int8).cpu(), weight.spec.bits, packed_dim=0)
    return tensors


def state_dict(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight | DenseWeight],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """All tensors of the checkpoint: `weights` packed, the rest of the model's parameters and buffers in `dtype`."""
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in packed:
            tensors[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
    for name, weight in packed.items():
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed_linear(weight).items()}
    return tensors


def quantization_config(model: nn.Module, quantized: set[str], spec: GridSpec, dequantize: bool) -> dict[str, Any]:
    """The entry of config.json from which transformers and vLLM know how to read the packed linears.

    `dequantize` makes transformers do so while it loads; asymmetric grids need that in any case.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    channel = spec.group_size == -1
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in quantized],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": spec.bits,
                    "type": "int",
                    "symmetric": spec.symmetric,
                    "strategy": "channel" if channel else "group",
                    "group_size": None if channel else spec.group_size,
                    "dynamic": False,
                },
            }
        },
    }
    return {**config, "dequantize": True} if dequantize or not spec.symmetric else config


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight | DenseWeight],
    spec: GridSpec | None,
    dequantize: bool,
    heads: Mapping[str, Mapping[str, Tensor]],
    base: Path,
    texts: Mapping[str, str],
    dtype: torch.dtype,
    shard_size: str,
) -> None:
    """Writes the checkpoint folder whole or not at all.

    `weights`: the linears that came out of the walk, on the grid `spec`, or dense where it is None. `dequantize`: see
    `quantization_config`. `heads`: tensors
    of each task's head. `base`: the folder whose config and processor files are taken over. `texts`: further files by
    name.
    """
    from huggingface_hub import save_torch_state_dict

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_torch_state_dict(state_dict(model, weights, dtype), partial, max_shard_size=shard_size)
        save_file(
            {f"{task}.{part}": t.cpu().contiguous() for task, head in heads.items() for part, t in head.items()},
            partial / HEADS,
        )
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        if spec is not None:
            config["quantization_config"] = quantization_config(model, set(weights), spec, dequantize)
        for name, text in {"config.json": json.dumps(config, indent=2) + "\n", **texts}.items():
            (partial / name).write_text(text, encoding="utf-8")
        for name in PROCESSOR_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, partial / name)
        mode = (partial / "config.json").stat().st_mode
        for path in partial.iterdir():  # safetensors writes files that nobody else may read
            path.chmod(mode)
        _sync(partial)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint cannot be written to {folder} ({error}); free some space or choose another out"
        ) from error


def linear_bytes(weights: Mapping[str, QuantizedWeight | DenseWeight], dtype: torch.dtype) -> int:
    """Bytes of these linears' weights in a checkpoint."""
    total = 0
    for weight in weights.values():
        parts = packed_linear(weight).values() if isinstance(weight, QuantizedWeight) else [weight.weight.to(dtype)]
        total += sum(part.numel() * part.itemsize for part in parts)
    return total


def weight_bytes(folder: Path) -> int:
    """Bytes of the model's safetensors files in a folder, task heads not counted."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != HEADS)


def _sync(folder: Path) -> None:
    """Returns when every file of the folder, and the folder itself, is on disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
