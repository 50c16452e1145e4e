"""What of open_clip's configs transformers' CLIPModel, image processor and tokenizer can express."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from epmq_cli.errors import ModelError

VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
RESAMPLE = {"bicubic": 3, "bilinear": 2}
"""Pillow's numbers by open_clip's names."""

EITHER_WAY = ("norm_kwargs", "output_tokens", "final_ln_after_pool")
READ = {
    "": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "output_dict"),
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"),
    "text_cfg": ("layers", "width", "heads", "mlp_ratio", "context_length", "pad_id", "eos_id"),
}
"""Options of open_clip's model_cfg that are read here, or make no difference to what CLIPModel computes."""
BESIDE = ("attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj", "hf_pooler_type", "hf_proj_type")
"""Options that count only beside others, which are refused."""
DEFAULTS: dict[str, tuple[object, ...]] = {
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "vocab_size": (VOCABULARY,),
}
"""What CLIPModel does too."""


def clip_config(config: Mapping[str, Any], path: Path, role: str) -> Any:
    """The CLIPConfig of an open_clip_config.json; ModelError where CLIPModel computes something else."""
    from transformers import CLIPConfig

    model = config.get("model_cfg") or {}
    refused = _refused(model, config.get("preprocess_cfg") or {})
    if refused:
        raise ModelError(
            f"{role}: {refused} in {path}, which transformers' CLIPModel has no place for; family open_clip takes "
            "plain vision transformers with a class token and CLIP's own text tower"
        )
    vision, text = model["vision_cfg"], model["text_cfg"]
    width = vision.get("width", 768)
    common = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        architectures=["CLIPModel"],
        vision_config={
            **common,
            **_sizes(vision, width, width // vision.get("head_width", 64), model["embed_dim"]),
            "image_size": _square(vision.get("image_size", 224)),
            "patch_size": _square(vision.get("patch_size", 16)),
        },
        text_config={
            **common,
            **_sizes(text, text.get("width", 512), text.get("heads", 8), model["embed_dim"]),
            "vocab_size": VOCABULARY,
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1,  # CLIPModel reads the features of its first occurrence
            "pad_token_id": VOCABULARY - 1,
        },
    )


def _sizes(tower: Mapping[str, Any], width: int, heads: int, projection: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": int(width * tower.get("mlp_ratio", 4.0)),
        "num_hidden_layers": tower.get("layers", 12),
        "num_attention_heads": heads,
        "projection_dim": projection,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _refused(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> str | None:
    """The first option that CLIPModel has no counterpart of, as a phrase; None where there is none."""
    if not model.get("embed_dim"):
        return "there is no model_cfg.embed_dim"
    for part, read in READ.items():
        options = model.get(part) if part else model
        if not isinstance(options, Mapping):
            return f"there is no model_cfg.{part}"
        for name, value in options.items():
            known = value in DEFAULTS[name] if name in DEFAULTS else name in (*read, *EITHER_WAY, *BESIDE)
            if value and not known:
                return f"{'.'.join(filter(None, ('model_cfg', part, name)))} is {value!r}"
        if set(options.get("norm_kwargs") or {}) - {"eps"}:
            return f"model_cfg.{part}.norm_kwargs is {options['norm_kwargs']!r}"
    vision = model["vision_cfg"]
    if not isinstance(vision.get("layers", 12), int):
        return f"model_cfg.vision_cfg.layers is {vision['layers']!r} (a ResNet)"
    for name in ("image_size", "patch_size"):
        if _square(vision.get(name, 16)) is None:
            return f"model_cfg.vision_cfg.{name} is {vision[name]!r}"
    return refused_preprocess(preprocess)


def refused_preprocess(preprocess: Mapping[str, Any]) -> str | None:
    """The first option of preprocess_cfg that CLIPImageProcessor has no counterpart of, as a phrase."""
    if preprocess.get("resize_mode", "shortest") not in ("shortest", "squash"):
        return f"preprocess_cfg.resize_mode is {preprocess['resize_mode']!r}"
    if preprocess.get("interpolation", "bicubic") not in RESAMPLE:
        return f"preprocess_cfg.interpolation is {preprocess['interpolation']!r}"
    return None


def _square(size: int | Iterable[int]) -> int | None:
    """The side of a square, given as one number or two."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def image_processor(config: Mapping[str, Any], clip: Any) -> Any:
    """open_clip's preprocessing for inference as a CLIPImageProcessor."""
    from transformers import CLIPImageProcessor

    given = config.get("preprocess_cfg") or {}
    side = clip.vision_config.image_size
    whole = {"height": side, "width": side}
    squash = given.get("resize_mode") == "squash"
    return CLIPImageProcessor(
        size=whole if squash else {"shortest_edge": side},
        crop_size=whole,
        do_center_crop=not squash,
        resample=RESAMPLE[given.get("interpolation", "bicubic")],
        image_mean=list(given.get("mean") or MEAN),
        image_std=list(given.get("std") or STD),
    )


def tokenizer(clip: Any) -> Any:
    """CLIP's tokenizer with the vocabulary that open_clip ships."""
    from transformers import CLIPTokenizer

    symbols, merges = _byte_symbols(), _merges()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.text_config.max_position_embeddings)


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in CLIP's vocabulary, in its order: printable bytes first, the others as
    the characters from 256 on."""
    printable = [*range(ord("!"), 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _merges() -> list[tuple[str, str]]:
    """The merges of open_clip's file that CLIP uses: as many as its vocabulary has words for, behind a line that names
    the version. The file is found without importing the package, which takes seconds."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModelError("family open_clip needs the package open_clip_torch; pip install open_clip_torch")
    path = Path(next(iter(package.submodule_search_locations))) / BPE_FILE
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : 1 + VOCABULARY - 512 - 2]]
    return [(first, second) for first, second in pairs]
