"""Writes a CLIPModel into `open_clip/` of its checkpoint as well, for open_clip itself:

    open_clip.create_model_and_transforms("local-dir:checkpoint/open_clip")
    open_clip.create_model_and_transforms(MODEL, pretrained="checkpoint/open_clip/open_clip_model.safetensors")

MODEL is `model_name` in open_clip_config.json, where open_clip's own list has such a model. The weights are dense:
merged, and dequantized where the checkpoint has them quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open_clip.convert import CONFIG, WEIGHTS
from epmq_cli.models.open_clip.export import Fused, NotExpressibleError, fused, model_cfg, named_model, preprocess_cfg
from epmq_cli.models.open_clip.preprocess import vocabulary
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_folder import processor_files
from epmq_cli.store.hashing import Content
from epmq_cli.store.safetensors_writer import NAMES, Entry, write_file

FOLDER = "open_clip"


def check_open_clip(base: ModelFolder) -> None:
    """ModelError where open_clip has no model with the same features as a base's CLIPModel."""
    try:
        open_clip_config(base.path)
        fused(base.infos)
    except NotExpressibleError as error:
        raise ModelError(
            f"{base.role}: {error} in {base.path}, which open_clip does not support; set pack.open_clip=false"
        ) from error


def open_clip_config(folder: Path) -> dict[str, Any]:
    """The open_clip_config.json of a folder with a CLIPModel; NotExpressibleError where open_clip has no such model."""
    from transformers import AutoImageProcessor

    config = config_of(folder)
    if config.model_type != "clip":
        raise NotExpressibleError(f"model_type is {config.model_type}")
    model = model_cfg(config)
    if _own_tokenizer(folder) is not None:
        model["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads it from the folder of the config
    written: dict[str, Any] = {"model_cfg": model}
    if processor_files(folder, "pictures"):
        processor = from_folder(AutoImageProcessor, folder)
        written["preprocess_cfg"] = preprocess_cfg(processor, config.vision_config.image_size)
    name = named_model(model)
    return {"model_name": name, **written} if name else written


def _own_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder; None where it is CLIP's, which open_clip has itself, or there is none."""
    from transformers import AutoTokenizer

    if not processor_files(folder, "texts"):
        return None
    tokenizer = from_folder(AutoTokenizer, folder)
    return None if tokenizer.get_vocab() == vocabulary() else tokenizer


def write_open_clip(checkpoint: Path, dense: Mapping[str, Entry]) -> dict[str, Content]:
    """Adds `open_clip/` to a checkpoint folder that has its config and its processors; what its weights' file holds, by
    path in the checkpoint. `dense`: the tensors of the CLIPModel by name."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    config = open_clip_config(checkpoint)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (tokenizer := _own_tokenizer(checkpoint)) is not None:
        tokenizer.save_pretrained(folder)
    entries = [_entry(tensor, [dense[part] for part in tensor.parts]) for tensor in fused(dense)]
    return {f"{FOLDER}/{WEIGHTS}": write_file(folder / WEIGHTS, entries)}


def _entry(tensor: Fused, parts: list[Entry]) -> Entry:
    rows, *rest = parts[0].shape or (0,)
    shape = parts[0].shape[::-1] if tensor.transposed else (rows * len(parts), *rest) if parts[0].shape else ()
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return Entry(tensor.name, dtype, shape, partial(_made, parts, tensor.transposed, dtype))


def _made(parts: list[Entry], transposed: bool, dtype: torch.dtype) -> Tensor:
    made = [part.make().to(dtype) for part in parts]
    if len(made) > 1:
        return torch.cat(made)
    return made[0].T.contiguous() if transposed else made[0]


def stored(folder: ModelFolder) -> dict[str, Entry]:
    """The tensors of a dense checkpoint, read when they are written again."""
    types = {name: dtype for dtype, name in NAMES.items()}
    return {
        name: Entry(name, types[info.dtype], info.shape, partial(folder.tensor, name))
        for name, info in folder.infos.items()
    }
