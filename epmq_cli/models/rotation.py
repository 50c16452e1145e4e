"""`transform=hadamard`: models that are rotated, which compute the same and quantize better.

A rotation R of the residual stream spreads its few large channels over all of them (QuaRot,
https://arxiv.org/abs/2404.00456, whose rotations within blocks need code in engines and are left out). What writes into
the stream is multiplied by R, what reads it by R', which is its inverse; RMSNorm does not see R once its weights are
folded into the linears that read it. So norms become 1, and an output layer that was tied to the embeddings is not any
more. Values are rotated within each head, and the output of attention takes that back.

R is a Hadamard matrix times random signs; a width that is no power of two has a random orthogonal factor as well. R is
the same for all models of one width, so that rotated models can be merged.

Of encoders only the values are rotated. Each has a LayerNorm whose gain is written to the stream itself (CLIP's first
one, those behind each part of BERT), and in rotated axes a gain does not scale channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError
from epmq_cli.models.model_folder import ModelFolder, Tensors, head_width

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3")
"""Decoders with RMSNorm in front of attention and of the feed-forward part, and nothing behind them."""
TABLE, HEAD, LAST = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BLOCK = r"model\.layers\.\d+\."
READS = {
    rf"({BLOCK})self_attn\.(?:q|k|v|qkv)_proj\.weight": "input_layernorm.weight",
    rf"({BLOCK})mlp\.(?:gate|up|gate_up)_proj\.weight": "post_attention_layernorm.weight",
}
"""The norm in front of the linears that read the residual stream."""
WRITES = re.compile(rf"{BLOCK}(?:self_attn\.o_proj|mlp\.down_proj)\.(?:weight|bias)")
NORM = re.compile(rf"{BLOCK}(?:input|post_attention)_layernorm\.weight|{re.escape(LAST)}")
VALUES = re.compile(rf"{BLOCK}self_attn\.v_proj\.(?:weight|bias)")
OUTPUT = re.compile(rf"{BLOCK}self_attn\.o_proj\.weight")


@dataclass(frozen=True)
class ValueHeads:
    """The linears that make the values of attention and those that read them, of an encoder."""

    values: Collection[str]
    """Stored names of weights (heads * width, in) and biases."""

    outputs: Collection[str]
    """Stored names of weights (out, heads * width)."""

    heads: int


def rotated(folder: ModelFolder, encoder: ValueHeads | None) -> ModelFolder:
    """The rotated model. `encoder`: the parts of an encoder. ConfigError if the architecture cannot be rotated."""
    if encoder is not None:
        return ModelFolder(folder.path, folder.role, folder.config, RotatedValues(folder.source, encoder))
    kind = folder.config.get("model_type")
    if kind not in MODEL_TYPES or TABLE not in folder.infos:
        raise ConfigError(
            f"transform=hadamard rotates decoders of the types {', '.join(MODEL_TYPES)} and the values of CLIP, ViT, "
            f"DeiT, BERT, RoBERTa, DistilBERT, DeBERTa, ELECTRA and MPNet, got {kind} in {folder.role}; use "
            "transform=none"
        )
    config = {**folder.config, "tie_word_embeddings": False}
    return ModelFolder(folder.path, folder.role, config, Rotated(folder.source, config))


class Rotated:
    """The tensors of a rotated model, in their stored types."""

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        self._tensors = tensors
        self.infos = dict(tensors.infos)
        self.infos.setdefault(HEAD, replace(tensors.infos[TABLE]))
        self._head, self._width = head_width(config), int(config["hidden_size"])

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        stored = self._tensors.tensor(name if name in self._tensors.infos else TABLE)
        if NORM.fullmatch(name):
            return torch.ones_like(stored)
        weight, R = stored.float(), rotation(self._width)
        if (norm := norm_before(name)) is not None:
            weight = weight * self._tensors.tensor(norm).float() @ R
        elif name == TABLE:
            weight = weight @ R
        elif WRITES.fullmatch(name):
            weight = R.T @ weight
        H = hadamard(self._head)
        if VALUES.fullmatch(name) and len(H) > 1:
            heads = weight.reshape(-1, self._head, *weight.shape[1:])
            weight = torch.einsum("ij,hj...->hi...", H, heads).reshape(weight.shape)
        elif OUTPUT.fullmatch(name) and len(H) > 1 and name.replace("o_proj", "v_proj") in self.infos:
            weight = (weight.reshape(len(weight), -1, self._head) @ H.T).reshape(weight.shape)
        return weight.to(stored.dtype).contiguous()


class RotatedValues:
    """The tensors of an encoder with rotated values, in their stored types."""

    def __init__(self, tensors: Tensors, encoder: ValueHeads) -> None:
        self._tensors, self._encoder = tensors, encoder
        self.infos = tensors.infos

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this name."""
        stored = self._tensors.tensor(name)
        if name in self._encoder.values:
            heads = stored.float().reshape(self._encoder.heads, -1, *stored.shape[1:])
            turned = torch.einsum("ji,hj...->hi...", rotation(heads.shape[1]), heads)
        elif name in self._encoder.outputs:
            heads = stored.float().reshape(len(stored), self._encoder.heads, -1)
            turned = heads @ rotation(heads.shape[2])
        else:
            return stored
        return turned.reshape(stored.shape).to(stored.dtype)


def norm_before(name: str) -> str | None:
    """The weight of the norm whose output a linear reads; None for other tensors."""
    if name == HEAD:
        return LAST
    for pattern, norm in READS.items():
        if found := re.fullmatch(pattern, name):
            return found[1] + norm
    return None


@lru_cache(maxsize=2)
def rotation(width: int) -> Tensor:
    """R, float32 (width, width)."""
    generator = torch.Generator().manual_seed(0)
    power = width & -width
    other, _ = torch.linalg.qr(torch.randn(width // power, width // power, dtype=torch.float64, generator=generator))
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return (signs * torch.kron(hadamard(power).double(), other.contiguous())).float()


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester as a rotation, float32 (size, size); (1, 1) if the size is no power of two."""
    H = torch.ones(1, 1)
    while len(H) < size and not size & (size - 1):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(len(H))
