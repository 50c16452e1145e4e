"""`pack.open_clip=true`: writes the CLIPModel of a checkpoint into its folder `open_clip/` as well, for open_clip:

    open_clip.create_model_and_transforms("local-dir:checkpoint/open_clip")
    open_clip.create_model_and_transforms(MODEL, pretrained="checkpoint/open_clip/open_clip_model.safetensors")

MODEL is `model_name` in open_clip_config.json, which exists if open_clip has a model of this architecture. The
weights are dense; quantized ones are dequantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.clip import Clip
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open_clip.convert import CONFIG, WEIGHTS
from epmq_cli.models.open_clip.export import Fused, NotExpressibleError, fused, model_cfg, named_model, preprocess_cfg
from epmq_cli.models.open_clip.preprocess import vocabulary
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_folder import processor_files
from epmq_cli.quantize.formats.format import DenseWeight, QuantizedWeight
from epmq_cli.store.safetensors_writer import Entry, writable_types, write_file

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "open_clip"

Entries = Mapping[str, Entry]
"""The tensors of a CLIPModel by name, each computed when it is written."""


def check_family(family: Family, name: str) -> None:
    """ConfigError if models of a family cannot be written for open_clip."""
    if not isinstance(family.architecture, Clip):
        raise ConfigError(f"pack.open_clip=true needs suite.family clip or open_clip, got {name}")


def check_base(base: ModelFolder) -> None:
    """ModelError if open_clip has no model with the same features as the base."""
    try:
        open_clip_config(base.path)
        fused(base.infos)
    except NotExpressibleError as error:
        raise ModelError(
            f"{base.role}: {error} in {base.path}, which open_clip does not support; set pack.open_clip=false"
        ) from error


def open_clip_config(folder: Path) -> dict[str, Any]:
    """The open_clip_config.json for a folder with a CLIPModel; NotExpressibleError if open_clip cannot express it."""
    from transformers import AutoImageProcessor

    config = config_of(folder)
    if config.model_type != "clip":
        raise NotExpressibleError(f"model_type is {config.model_type}")
    model = model_cfg(config)
    if _own_tokenizer(folder) is not None:
        model["text_cfg"]["hf_tokenizer_name"] = "."  # any name makes open_clip read the files beside its config
    written: dict[str, Any] = {"model_cfg": model}
    if processor_files(folder, "pictures"):
        processor = from_folder(AutoImageProcessor, folder)
        written["preprocess_cfg"] = preprocess_cfg(processor, config.vision_config.image_size)
    name = named_model(model)
    return {"model_name": name, **written} if name else written


def _own_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder; None if there is none, or if it is CLIP's, which open_clip contains."""
    from transformers import AutoTokenizer

    if not processor_files(folder, "texts"):
        return None
    tokenizer = from_folder(AutoTokenizer, folder)
    return None if tokenizer.get_vocab() == vocabulary() else tokenizer


def also_open_clip(
    enabled: bool, save_others: Callable[[Path], None], entries_of: Callable[[Path], Entries]
) -> Callable[[Path], None]:
    """`save_others`, which writes further files of a checkpoint, followed by `write_open_clip` if `enabled`
    (pack.open_clip)."""

    def save(checkpoint: Path) -> None:
        save_others(checkpoint)
        write_open_clip(entries_of, checkpoint)

    return save if enabled else save_others


def write_open_clip(entries_of: Callable[[Path], Entries], checkpoint: Path) -> None:
    """Adds `open_clip/` to a checkpoint folder that already has its config and processors. `entries_of` returns the
    tensors of its CLIPModel."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    text = json.dumps(open_clip_config(checkpoint), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if (tokenizer := _own_tokenizer(checkpoint)) is not None:
        tokenizer.save_pretrained(folder)
    parts = entries_of(checkpoint)
    entries = [_entry(tensor, [parts[name] for name in tensor.parts]) for tensor in fused(parts)]
    write_file(folder / WEIGHTS, entries)


def dequantized_entries(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight | DenseWeight],
    dtype: torch.dtype,
    checkpoint: Path,
) -> Entries:
    """The tensors of a run's checkpoint, dequantized.

    `model`: the student. `weights`: the weights of its linears by module name. `dtype`: the type of the checkpoint.
    """
    entries = {}
    for name, tensor in model.state_dict().items():
        weight = weights.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        convert = tensor.to if weight is None else partial(_dequantized, weight)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        entries[name] = Entry(name, kind, tuple(tensor.shape), partial(convert, kind))
    return entries


def _dequantized(weight: QuantizedWeight | DenseWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize().to(dtype)


def stored_entries(checkpoint: Path) -> Entries:
    """The tensors of a dense checkpoint, each read when it is copied."""
    folder, types = ModelFolder(checkpoint, "checkpoint"), writable_types()
    return {
        name: Entry(name, types[info.dtype], info.shape, partial(folder.tensor, name))
        for name, info in folder.infos.items()
    }


def _entry(tensor: Fused, parts: list[Entry]) -> Entry:
    """The entry of a tensor of open_clip, computed from the entries of CLIPModel's tensors."""
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    shape = parts[0].shape[::-1] if tensor.transposed else parts[0].shape
    if len(parts) > 1:
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    return Entry(tensor.name, dtype, shape, partial(_fused_tensor, parts, tensor.transposed, dtype))


def _fused_tensor(parts: list[Entry], transposed: bool, dtype: torch.dtype) -> Tensor:
    tensors = [part.make().to(dtype) for part in parts]
    if len(tensors) > 1:
        return torch.cat(tensors)
    return tensors[0].T.contiguous() if transposed else tensors[0]
