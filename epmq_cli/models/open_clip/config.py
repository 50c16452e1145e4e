"""Translates open_clip's model configs into transformers' CLIPConfig, if CLIPModel computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from epmq_cli.errors import ModelError

SCHEME = "open_clip:"
"""In front of the names of open_clip's own models."""
VOCABULARY = 49408
"""The number of CLIP's tokens; the last one ends a text."""

TRANSLATED = {
    "": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"),
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"),
    "text_cfg": ("layers", "width", "heads", "mlp_ratio", "context_length", "norm_kwargs"),
}
"""Options of a model_cfg that CLIPConfig has too."""
WITHOUT_EFFECT = {
    "": ("custom_text", "init_logit_scale", "output_dict"),
    "vision_cfg": (
        "patch_dropout",
        "output_tokens",
        "final_ln_after_pool",
        "attn_pooler_queries",
        "attn_pooler_heads",
        "timm_pool",
        "timm_proj",
    ),
    "text_cfg": ("pad_id", "eos_id", "output_tokens", "final_ln_after_pool", "hf_pooler_type", "hf_proj_type"),
}
"""Options that do not change the features of a plain vision transformer and its text tower."""
EQUIVALENT: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("vision_cfg", "pos_embed_type"): ("sin_cos_2d",),
    ("vision_cfg", "block_type"): ("default",),
    ("text_cfg", "block_type"): ("default",),
}
"""Values that mean the same for CLIPModel as open_clip's default: fixed positions are stored like learnt ones."""


def clip_config(config: Mapping[str, Any], where: Path | str, role: str) -> Any:
    """The CLIPConfig of an open_clip_config.json; ModelError if CLIPModel does not compute the same.

    `where`: the source of the config, for the error.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from transformers import CLIPConfig

    model = config.get("model_cfg") or {}
    if refused := _refused(model):
        raise ModelError(
            f"{role}: {refused} in {where}; family open_clip needs a plain vision transformer with a class token and "
            "CLIP's own text tower, as transformers' CLIPModel has them"
        )
    vision = {**vars(CLIPVisionCfg()), **model["vision_cfg"]}
    text = {**vars(CLIPTextCfg()), **model["text_cfg"]}
    common = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        architectures=["CLIPModel"],
        vision_config={
            **common,
            **_sizes(vision, vision["width"] // vision["head_width"], model["embed_dim"]),
            "image_size": _square(vision["image_size"]),
            "patch_size": _square(vision["patch_size"]),
        },
        text_config={
            **common,
            **_sizes(text, text["heads"], model["embed_dim"]),
            "vocab_size": VOCABULARY,
            "max_position_embeddings": text["context_length"],
            "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1,  # CLIPModel reads the features of its first occurrence
            "pad_token_id": VOCABULARY - 1,
        },
    )


def _sizes(tower: Mapping[str, Any], heads: int, projection: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "projection_dim": projection,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _refused(model: Mapping[str, Any]) -> str | None:
    """The first option that CLIPModel does not support, as a phrase; None if it supports all."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if not model.get("embed_dim"):
        return "model_cfg.embed_dim is missing"
    towers = {"vision_cfg": CLIPVisionCfg(), "text_cfg": CLIPTextCfg()}
    for part in TRANSLATED:
        options = model.get(part) if part else model
        if not isinstance(options, Mapping):
            return f"model_cfg.{part} is missing"
        for name, value in options.items():
            if not _supported(part, name, value, getattr(towers.get(part), name, None)):
                return f"{'.'.join(filter(None, ('model_cfg', part, name)))} is {value!r}"
        if set(options.get("norm_kwargs") or {}) - {"eps"}:
            return f"model_cfg.{part}.norm_kwargs is {options['norm_kwargs']!r}"
    vision = model["vision_cfg"]
    if not isinstance(vision.get("layers", 12), int):
        return f"model_cfg.vision_cfg.layers is {vision['layers']!r} (a ResNet)"
    for name in ("image_size", "patch_size"):
        if _square(vision.get(name, 16)) is None:
            return f"model_cfg.vision_cfg.{name} is {vision[name]!r}"
    return None


def _supported(part: str, name: str, value: object, default: object) -> bool:
    """Whether CLIPModel computes the same with this option as open_clip."""
    if name in (*TRANSLATED[part], *WITHOUT_EFFECT[part]) or value in EQUIVALENT.get((part, name), ()):
        return True
    return value == default or not value  # None, False and 0 turn an option off


def _square(size: int | Iterable[int]) -> int | None:
    """The side of a square, given as one number or two; None if the two differ."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None
