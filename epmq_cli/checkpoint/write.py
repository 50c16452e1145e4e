"""Writes the checkpoint folder of `epmq run`: the model's tensors, its config, heads, processors, record and card.

The folder gets its name in one step, when all of its files are on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.errors import CheckpointError
from epmq_cli.merge.vocabulary import vocabulary_of, with_vocabulary
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.models.stored import as_stored
from epmq_cli.quantize.formats.format import DenseWeight, QuantizedWeight
from epmq_cli.store.atomic import atomic_folder
from epmq_cli.store.hashing import Content
from epmq_cli.store.manifest import files_within, write_manifest
from epmq_cli.store.safetensors_writer import Entry, check_finite, of, write_model

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADS = "heads/heads.safetensors"
"""In a separate folder, because vLLM reads every .safetensors file beside config.json as a part of the model."""
OLD_HEADS = "heads.safetensors"
"""The file that earlier versions of epmq wrote the heads to."""
RECORD = "epmq.json"


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint.

    `exporter`: stores quantized weights. `model`: the student after the walk. `weights`: the weights of
    its blocks' linears by module name, quantized or dense. `dequantize`: see Exporter.config. `heads`: the tensors of
    each task's head. `base`: the folder whose config and processor files are copied. `texts`: further files by name.
    `dtype`: the type of unquantized tensors. `changes`: the entries of config.json that differ from the base's.
    `save_others`: writes further files and folders into the checkpoint folder. `cache`: the scales of cached keys and
    values, by the names of their tensors.
    """

    exporter: Exporter
    model: nn.Module
    weights: Mapping[str, QuantizedWeight | DenseWeight]
    dequantize: bool
    heads: Mapping[str, Mapping[str, Tensor]]
    base: Path
    texts: Mapping[str, str]
    dtype: torch.dtype
    changes: Mapping[str, Any] = field(default_factory=dict)
    save_others: Callable[[Path], None] = lambda folder: None
    cache: Mapping[str, float] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, QuantizedWeight]:
        """The weights that are quantized."""
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, QuantizedWeight)}


def entries(contents: Contents) -> list[Entry]:
    """All tensors of the model: quantized linears as the exporter stores them, all others in `dtype`."""
    quantized = contents.quantized
    dense = dense_entries(contents.model, quantized, contents.dtype)
    dense += [entry for name, weight in quantized.items() for entry in contents.exporter.entries(name, weight)]
    dense += [of(name, torch.tensor([scale])) for name, scale in contents.cache.items()]
    own: Any = contents.model
    return as_stored(own.config.model_type, dense)


def dense_entries(model: nn.Module, quantized: Collection[str], dtype: torch.dtype) -> list[Entry]:
    """The model's tensors in `dtype`, without the weights of quantized linears, given by module name."""
    found = []
    for name, tensor in untied(model).items():
        if name.removesuffix(".weight") not in quantized:
            own = dtype if tensor.is_floating_point() else tensor.dtype
            found.append(Entry(name, own, tuple(tensor.shape), partial(tensor.to, own)))
    return found


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without those that are tied to another one."""
    own = model.state_dict()
    sources = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name for name, source in sources.items() if own[name].data_ptr() == own[source].data_ptr()}
    return {name: tensor for name, tensor in own.items() if name not in tied}


@contextmanager
def whole(folder: Path) -> Iterator[tuple[Path, dict[str, Content]]]:
    """Yields a folder to write into, which gets its name when the block ends and all files are on disk.

    The manifest is written last; files whose contents the block puts into the dict are not hashed again. If the block
    fails, nothing is left behind. CheckpointError if the disk is full or read-only."""
    hashed: dict[str, Content] = {}
    try:
        with atomic_folder(folder) as temporary:
            yield temporary, hashed
            write_manifest(temporary, hashed)
    except (OSError, SafetensorError) as error:  # a full disk raises either of them
        raise CheckpointError(
            f"the checkpoint cannot be written to {folder} ({error}); free some space or choose another out"
        ) from error


def write_checkpoint(folder: Path, contents: Contents, shard_bytes: int) -> None:
    """Writes the complete checkpoint folder, or nothing; CheckpointError if the disk is full or read-only."""
    with whole(folder) as (temporary, hashed):
        hashed |= write_model(temporary, entries(contents), shard_bytes)
        _write_others(temporary, contents)


def _write_others(folder: Path, contents: Contents) -> None:
    """Writes everything except the model's tensors."""
    heads = {
        f"{task}.{part}": t.cpu().contiguous() for task, head in contents.heads.items() for part, t in head.items()
    }
    for name, tensor in heads.items():
        check_finite(name, tensor)
    if heads:
        (folder / HEADS).parent.mkdir()
        from safetensors.torch import save_file  # imports torch

        save_file(heads, folder / HEADS)
    config = json.loads((contents.base / "config.json").read_text(encoding="utf-8"))
    config |= contents.changes
    config |= {"architectures": [type(contents.model).__name__], "dtype": str(contents.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if vocabulary_of(config) is not None:  # larger than the base's if vocabularies are padded
        config = with_vocabulary(config, _vocabulary(contents.model))
    texts = dict(contents.texts)
    if contents.quantized:
        # transformers rounds cached keys and values unless it dequantizes
        dequantize = contents.dequantize or bool(contents.cache)
        quantization = contents.exporter.config(contents.model, contents.quantized, dequantize)
        quantization |= contents.exporter.cache_config if contents.cache else {}
        config |= {"quantization_config": quantization} if quantization else {}
        texts |= contents.exporter.files(quantization)
    for name, text in {"config.json": json.dumps(config, indent=2) + "\n", **texts}.items():
        (folder / name).write_text(text, encoding="utf-8")
    ProcessorFiles(contents.base).copy(folder)
    contents.save_others(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in files_within(folder).values():  # safetensors writes files that nobody else may read
        path.chmod(mode)


def _vocabulary(model: Any) -> int:
    """The size of a model's vocabulary, or that of its language model."""
    size: int = getattr(model.config, "vocab_size", None) or model.config.get_text_config().vocab_size
    return size


def heads_file(folder: Path) -> Path:
    """The file with the heads of a checkpoint's tasks: `HEADS`, or `OLD_HEADS` if only that exists."""
    old = folder / OLD_HEADS
    return old if old.is_file() and not (folder / HEADS).is_file() else folder / HEADS


def linear_bytes(contents: Contents) -> int:
    """The stored size of the calibrated linears' weights, in bytes."""
    return sum(
        sum(entry.size for entry in contents.exporter.entries(name, weight))
        if isinstance(weight, QuantizedWeight)
        else weight.weight.numel() * contents.dtype.itemsize
        for name, weight in contents.weights.items()
    )


def weight_bytes(folder: Path) -> int:
    """The size of the model's safetensors files in a folder, in bytes, without task heads."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != OLD_HEADS)
