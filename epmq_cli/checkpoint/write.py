"""Writes a checkpoint that transformers loads with nothing of ours installed: compressed-tensors, pack-quantized.

vLLM 0.32 was tried on a CPU with decoders, BERT and CLIP. It loads unquantized checkpoints and 4 bits, in groups of 32,
64 or 128 inputs or with one scale a row, symmetric or not. It refuses 3, 8 and mixed bits there: no kernel takes them.
Its sources have kernels for 8 bits (Marlin) and for all widths (Humming) on CUDA only.

The folder appears under its name in one step, when all of its files are on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq_cli.errors import CheckpointError
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.quantize.formats.format import DenseWeight, NumberFormat, QuantizedWeight
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.store.atomic import PARTIAL, sync
from epmq_cli.store.hashing import Content
from epmq_cli.store.manifest import files_within, write_manifest
from epmq_cli.store.safetensors_writer import Entry, check_finite, of, write_model

HEADS = "heads/heads.safetensors"
"""In a folder of its own: vLLM takes every .safetensors file beside config.json for a part of the model."""
OLD_HEADS = "heads.safetensors"
"""Where earlier versions of epmq wrote it."""
RECORD = "epmq.json"


def packed_linear(name: str, weight: QuantizedWeight) -> list[Entry]:
    """The tensors of one linear, each packed when it is written."""
    scale = weight.grid.scale
    entries = [
        Entry(f"{name}.weight_scale", weight.dtype, tuple(scale.shape), lambda: scale.to(weight.dtype)),
    ]
    if isinstance(weight.format, Fp8Format):
        return [of(f"{name}.weight", weight.codes), *entries]
    return [*_packed_codes(name, weight), *entries]


def _packed_codes(name: str, weight: QuantizedWeight) -> list[Entry]:
    """Integers and their zero points, packed into int32."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, codes, zero = weight.format.bits, weight.codes, weight.grid.zero
    words = pack_to_int32(codes[:1].cpu(), bits).shape[1]
    entries = [
        Entry(f"{name}.weight_packed", torch.int32, (len(codes), words), lambda: pack_to_int32(codes.cpu(), bits)),
        of(f"{name}.weight_shape", torch.tensor(codes.shape)),
    ]
    if zero is not None:
        points = pack_to_int32(zero.to(torch.int8).cpu(), bits, packed_dim=0).contiguous()
        entries.append(of(f"{name}.weight_zero_point", points))
    return entries


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint is made of.

    `model`: the student as the walk left it. `weights`: its blocks' linears by module name, each on a grid of its own
    or dense. `dequantize`: see `quantization_config`. `heads`: tensors of each task's head. `base`: the folder whose
    config and processor files are taken over. `texts`: further files by name. `dtype`: of all that is not packed.
    `changes`: entries of config.json that are other than the base's. `save_others`: writes further files and folders
    into the checkpoint's.
    """

    model: nn.Module
    weights: Mapping[str, QuantizedWeight | DenseWeight]
    dequantize: bool
    heads: Mapping[str, Mapping[str, Tensor]]
    base: Path
    texts: Mapping[str, str]
    dtype: torch.dtype
    changes: Mapping[str, Any] = field(default_factory=dict)
    save_others: Callable[[Path], None] = lambda folder: None


def entries(contents: Contents) -> list[Entry]:
    """All tensors of the model: quantized linears packed, the other parameters and buffers in `dtype`."""
    packed = {name: weight for name, weight in contents.weights.items() if isinstance(weight, QuantizedWeight)}
    found = []
    for name, tensor in untied(contents.model).items():
        if name.removesuffix(".weight") not in packed:
            dtype = contents.dtype if tensor.is_floating_point() else tensor.dtype
            found.append(Entry(name, dtype, tuple(tensor.shape), partial(tensor.to, dtype)))
    return found + [entry for name, weight in packed.items() for entry in packed_linear(name, weight)]


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, each once: of those that are tied the one that the others are tied to."""
    own = model.state_dict()
    sources = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name for name, source in sources.items() if own[name].data_ptr() == own[source].data_ptr()}
    return {name: tensor for name, tensor in own.items() if name not in tied}


def quantization_config(model: nn.Module, formats: Mapping[str, NumberFormat], dequantize: bool) -> dict[str, Any]:
    """The entry of config.json that describes the quantized linears to readers of compressed-tensors, given the format
    of each by name.

    One group if all have the same format, else one for each. `dequantize` makes transformers do so while it loads;
    formats with zero points need that in any case. With several formats it must not, since transformers would take the
    first for all.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = sorted(set(formats.values()), key=lambda format: format.bits)
    names = dict.fromkeys(_compression(format) for format in kinds)
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(kinds) == 1 else [name for name in linears if formats.get(name) == format],
            "weights": _weights_entry(format),
            **({"format": _compression(format)} if len(names) > 1 else {}),
        }
        for index, format in enumerate(kinds)
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(names) > 1 else next(iter(names)),
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in formats],
        "config_groups": groups,
    }
    wanted = len(kinds) == 1 and (dequantize or kinds[0].zero_points != "none")
    return {**config, "dequantize": True} if wanted else config


def _compression(format: NumberFormat) -> str:
    """What compressed-tensors calls the way that a format is stored."""
    return "float-quantized" if isinstance(format, Fp8Format) else "pack-quantized"


def _weights_entry(format: NumberFormat) -> dict[str, Any]:
    channel = format.group_size == -1
    return {
        "num_bits": format.bits,
        "type": "float" if isinstance(format, Fp8Format) else "int",
        "symmetric": format.zero_points == "none",
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else format.group_size,
        "dynamic": False,
    }


@contextmanager
def whole(folder: Path) -> Iterator[tuple[Path, dict[str, Content]]]:
    """A folder to write into, which is on disk and has its name when the block is over; CheckpointError where the disk
    does not take it. Its manifest is written last; files that the block puts into the dict are not read for it. Nothing
    is left of a block that fails."""
    known: dict[str, Content] = {}
    temporary = folder.with_name(PARTIAL.format(folder.name))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary, known
        write_manifest(temporary, known)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other, by who writes
        raise CheckpointError(
            f"the checkpoint cannot be written to {folder} ({error}); free some space or choose another out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_checkpoint(folder: Path, contents: Contents, shard_bytes: int) -> None:
    """Writes the checkpoint folder whole or not at all; CheckpointError where the disk does not take it."""
    with whole(folder) as (temporary, known):
        known |= write_model(temporary, entries(contents), shard_bytes)
        _write_others(temporary, contents)


def _write_others(folder: Path, contents: Contents) -> None:
    """Everything but the model's tensors."""
    heads = {
        f"{task}.{part}": t.cpu().contiguous() for task, head in contents.heads.items() for part, t in head.items()
    }
    for name, tensor in heads.items():
        check_finite(name, tensor)
    if heads:
        (folder / HEADS).parent.mkdir()
        save_file(heads, folder / HEADS)
    config = json.loads((contents.base / "config.json").read_text(encoding="utf-8"))
    config |= contents.changes
    config |= {"architectures": [type(contents.model).__name__], "dtype": str(contents.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if "vocab_size" in config:  # larger than the base's where vocabularies were padded
        own: Any = contents.model.config
        config["vocab_size"] = own.vocab_size
    formats = {name: weight.format for name, weight in contents.weights.items() if isinstance(weight, QuantizedWeight)}
    if formats:
        config["quantization_config"] = quantization_config(contents.model, formats, contents.dequantize)
    for name, text in {"config.json": json.dumps(config, indent=2) + "\n", **contents.texts}.items():
        (folder / name).write_text(text, encoding="utf-8")
    ProcessorFiles(contents.base).copy(folder)
    contents.save_others(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in files_within(folder).values():  # safetensors writes files that nobody else may read
        path.chmod(mode)


def heads_file(folder: Path) -> Path:
    """Where a checkpoint keeps the heads of its tasks: `HEADS`, or `OLD_HEADS` where only that is there."""
    old = folder / OLD_HEADS
    return old if old.is_file() and not (folder / HEADS).is_file() else folder / HEADS


def linear_bytes(contents: Contents) -> int:
    """Bytes of the calibrated linears' weights in a checkpoint."""
    return sum(
        sum(entry.size for entry in packed_linear(name, weight))
        if isinstance(weight, QuantizedWeight)
        else weight.weight.numel() * contents.dtype.itemsize
        for name, weight in contents.weights.items()
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of the model's safetensors files in a folder, task heads not counted."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != OLD_HEADS)
