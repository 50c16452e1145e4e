"""Translates a CLIPModel of transformers back to open_clip: its config, preprocessing and tensors.

Raises NotExpressibleError for models that open_clip cannot express exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from epmq_cli.models.open_clip.preprocess import image_processor
from epmq_cli.models.open_clip.tensors import MODULES, NAMES, TRANSPOSED

ACTIVATIONS = {"gelu": False, "quick_gelu": True}
"""Activations of a CLIPConfig, and open_clip's option quick_gelu for each."""
LARGEST = 2
"""The eos_token_id of old CLIPConfigs, with which CLIPModel pools texts at the largest token id, as open_clip does."""
EPS = 1e-5
"""The default epsilon of open_clip's layer norms."""
PIXELS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""The settings of a CLIPImageProcessor that affect its pixels."""
BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
BUFFERS = (".position_ids",)


class NotExpressibleError(Exception):
    """open_clip lacks a feature of the model; the message names it as a phrase."""


def model_cfg(config: Any) -> dict[str, Any]:
    """The model_cfg that gives the same features as a CLIPConfig; NotExpressibleError if there is none."""
    vision, text = config.vision_config, config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        raise NotExpressibleError(f"hidden_act is {' and '.join(sorted(activations))}")
    if vision.num_channels != 3:
        raise NotExpressibleError(f"vision_config.num_channels is {vision.num_channels}")
    cfg = {
        "embed_dim": config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_sizes(text),
            **_pooling(text),
        },
    }
    return {**cfg, "quick_gelu": True} if ACTIVATIONS[vision.hidden_act] else cfg


def _sizes(tower: Any) -> dict[str, Any]:
    width, inner = tower.hidden_size, tower.intermediate_size
    ratio = inner / width
    if int(width * ratio) < inner:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    sizes = {"layers": tower.num_hidden_layers, "width": width, "mlp_ratio": ratio}
    return sizes if tower.layer_norm_eps == EPS else {**sizes, "norm_kwargs": {"eps": tower.layer_norm_eps}}


def _pooling(text: Any) -> dict[str, Any]:
    """The pooling of texts: at the largest token id, which is open_clip's default, or at the end token."""
    if text.eos_token_id in (LARGEST, text.vocab_size - 1):
        return {}
    return {"pool_type": "eos", "eos_id": text.eos_token_id}


def preprocess_cfg(processor: Any, side: int) -> dict[str, Any]:
    """The preprocess_cfg of an image processor, for images of `side` pixels; NotExpressibleError if there is none."""
    own = processor.to_dict()
    squash = not own.get("do_center_crop")
    cfg = {
        "mean": list(own.get("image_mean") or ()),
        "std": list(own.get("image_std") or ()),
        "interpolation": _interpolation(own.get("resample")),
        "resize_mode": "squash" if squash else "shortest",
    }
    back = image_processor(cfg, side).to_dict()
    for name in PIXELS:
        if own.get(name) != back.get(name) and not (squash and name == "crop_size"):
            raise NotExpressibleError(f"{name} of the image processor is {own.get(name)}")
    return cfg


def _interpolation(resample: Any) -> str:
    """open_clip's name of one of Pillow's filters."""
    names: dict[Any, str] = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
    if resample not in names:
        raise NotExpressibleError(f"resample of the image processor is {resample}")
    return names[resample]


@dataclass(frozen=True)
class Fused:
    """A tensor of open_clip, and the tensors of CLIPModel that it is made of: one, or several concatenated by rows."""

    name: str
    parts: tuple[str, ...]
    transposed: bool


def fused(names: Iterable[str]) -> list[Fused]:
    """open_clip's tensors for the tensors of a CLIPModel; NotExpressibleError if open_clip lacks one of them."""
    tensors: dict[str, Fused] = {}
    for name in names:
        if name.endswith(BUFFERS):
            continue
        tensor = _fused(name)
        if tensor is None:
            raise NotExpressibleError(f"the model has {name}")
        tensors[tensor.name] = tensor
    return list(tensors.values())


def _fused(name: str) -> Fused | None:
    if name in OWN_NAMES:
        return Fused(OWN_NAMES[name], (name,), OWN_NAMES[name] in TRANSPOSED)
    block = BLOCK.fullmatch(name)
    if block is None or block[3] not in OWN_MODULES:
        return None
    tower = "visual." if block[1] == "vision" else ""
    module = OWN_MODULES[block[3]]
    layer = f"{block[1]}_model.encoder.layers.{block[2]}"
    parts = tuple(f"{layer}.{part}.{block[4]}" for part in MODULES[module])
    separator = "_" if len(parts) > 1 else "."  # the fused projections are parameters, not modules
    return Fused(f"{tower}transformer.resblocks.{block[2]}.{module}{separator}{block[4]}", parts, False)


OWN_NAMES = {clip: own for own, clip in NAMES.items()}
OWN_MODULES = {part: own for own, parts in MODULES.items() for part in parts}
"""open_clip's modules of a block by CLIPModel's."""


def named_model(cfg: Mapping[str, Any]) -> str | None:
    """The name of the model with this model_cfg in open_clip's list; None if it has none."""
    import open_clip

    target = _normalized(cfg)
    for name in open_clip.list_models():
        if _normalized(open_clip.get_model_config(name)) == target:
            return str(name)
    return None


def _normalized(cfg: Mapping[str, Any]) -> Any:
    """A model_cfg with open_clip's defaults filled in and hidden sizes as whole numbers, for comparisons."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    towers = [CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])]
    towers = [replace(tower, mlp_ratio=int(tower.width * tower.mlp_ratio)) for tower in towers]
    rest = {key: value for key, value in cfg.items() if key not in ("vision_cfg", "text_cfg", "custom_text") and value}
    return rest, towers
