"""Small random encoders, and checkpoints of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as t
from torch import nn

from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.quantize.formats.int import IntFormat
from tests.helpers.byte_level import quantized
from tests.helpers.packs import exporter_of

ROWS, PIXELS, POSITIONS = 100, 16, 40
SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {"image_size": PIXELS, "patch_size": 8, **SIZE}
TEXTS: dict[str, Any] = {"vocab_size": ROWS, "max_position_embeddings": POSITIONS, **SIZE}
DISTIL: dict[str, Any] = {"dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4, "vocab_size": ROWS}
BY_DISTANCE: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
MODERN: dict[str, Any] = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
MODELS = {
    "clip": lambda: t.CLIPModel(
        t.CLIPConfig(vision_config=IMAGES, text_config={**TEXTS, "eos_token_id": ROWS - 1}, projection_dim=32)
    ),
    "vit": lambda: t.ViTModel(t.ViTConfig(**IMAGES), add_pooling_layer=False),
    "bert": lambda: t.BertModel(t.BertConfig(**TEXTS)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**TEXTS, type_vocab_size=1), add_pooling_layer=False),
    "distilbert": lambda: t.DistilBertModel(t.DistilBertConfig(**DISTIL)),
    "deberta": lambda: t.DebertaV2Model(t.DebertaV2Config(**TEXTS, **BY_DISTANCE)),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(**TEXTS, embedding_size=64)),
    "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**TEXTS), add_pooling_layer=False),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**IMAGES), add_pooling_layer=False),
    "modernbert": lambda: t.ModernBertModel(t.ModernBertConfig(**TEXTS, **MODERN, local_attention=8)),
}


def write_encoder(
    folder: Path,
    kind: str,
    bits: int = 4,
    points: Literal["none", "whole"] = "none",
    group_size: int = 32,
    pack: str = "compressed_tensors",
) -> Path:
    """Writes a checkpoint of a small random encoder in float32, rounded to nearest. Returns its folder."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    base = folder / "base"
    model.save_pretrained(base)
    format = IntFormat(bits, group_size, points)
    weights = {
        name: replace(quantized(module.weight.detach(), format), dtype=torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layer" in name
    }
    contents = Contents(exporter_of(pack, dtype="float32"), model, weights, False, {}, base, {}, torch.float32)
    write_checkpoint(folder / "checkpoint", contents, 10**9)
    return folder / "checkpoint"
