"""How llama.cpp names a decoder's parts: its metadata from config.json, and the order of rows in its tensors.

An architecture is a row of `ARCHITECTURES`. The keys of metadata are those of the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq_cli.errors import ConfigError


@dataclass(frozen=True)
class GgufArchitecture:
    """`name`: in llama.cpp. `interleaved`: whether its rotary embeddings turn neighbouring rows of queries and keys,
    where those of transformers turn rows of the two halves of a head."""

    name: str
    interleaved: bool = False


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", interleaved=True),
    "mistral": GgufArchitecture("llama", interleaved=True),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
}
"""By `model_type` of config.json."""


def architecture_of(config: Mapping[str, Any]) -> GgufArchitecture:
    """The architecture of a config.json. ConfigError if epmq does not write it as GGUF."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"GGUF is written for {', '.join(ARCHITECTURES)}, got the model type {kind}")
    found = ARCHITECTURES[str(kind)]
    if config.get("use_sliding_window") or (config.get("sliding_window") and kind == "mistral"):
        raise ConfigError(f"GGUF is written for full attention, got {kind} with a sliding window in config.json")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ConfigError(f"GGUF is written for rotary embeddings default, linear or llama3, got {rope['rope_type']}")
    return found


def head_width(config: Mapping[str, Any]) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Writes the keys of the architecture with a writer of the package gguf."""
    width, rope = head_width(config), _rope(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rotary_factors(config: Mapping[str, Any]) -> Tensor | None:
    """The divisors of the rotary frequencies of Llama 3.1 (head width / 2,), which llama.cpp reads as a tensor; None
    for models without. The frequencies of long waves are divided by `factor`, those of short waves stay, as in
    transformers' rope type llama3."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width, base = head_width(config), float(rope["rope_theta"])
    waves = 2 * math.pi * base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    length, low, high = (float(rope[key]) for key in LLAMA3)
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys, or their biases, in the order of llama.cpp: neighbours are turned together."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def heads_of(name: str, config: Mapping[str, Any]) -> int:
    """The heads whose rows a tensor of queries or keys has; 0 for other tensors."""
    queries = int(config["num_attention_heads"])
    if ".self_attn.q_proj." in f"{name}.":
        return queries
    return int(config.get("num_key_value_heads") or queries) if ".self_attn.k_proj." in f"{name}." else 0


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of rotary embeddings, which older configs spread over several keys."""
    older = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = {"rope_type": given["type"]} if "type" in given else {}
    return {**older, **kind, **given}
