"""How llama.cpp names a decoder's parts: its metadata from config.json, and the order of rows in its tensors.

An architecture is a row of `ARCHITECTURES`. The keys of metadata are those of the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.errors import ConfigError
from epmq_cli.models.model_folder import head_width

if TYPE_CHECKING:
    from torch import Tensor

GATED = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh",)}
"""Activation functions that llama.cpp computes alike, by config.json's names of them."""
GEMMA_27B = (46, 62)
"""The numbers of blocks of Gemma 2 and 3 with 27 B parameters, for which llama.cpp scales queries by another width."""


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    `name`: in llama.cpp. `interleaved`: whether its rotary embeddings turn neighbouring rows of queries and keys, where
    those of transformers turn rows of the two halves of a head. `offset`: what it adds to norms' weights of
    transformers. `activation`: of its feed-forward layers. `numbers`: keys of config.json by the methods of the package
    gguf's writer that store them. `windows`: whether it has sliding windows. `check`: returns what of a config it has
    otherwise, in words, or None.
    """

    name: str
    interleaved: bool = False
    offset: int = 0
    activation: str = "silu"
    numbers: Mapping[str, str] = field(default_factory=dict)
    windows: bool = False
    check: Callable[[Mapping[str, Any]], str | None] = lambda config: None


def _gemma(period: int) -> Callable[[Mapping[str, Any]], str | None]:
    """The check of Gemma with full attention in every block number `period`."""

    def check(config: Mapping[str, Any]) -> str | None:
        count, width = int(config["num_hidden_layers"]), head_width(config)
        if count in GEMMA_27B:
            width = config["hidden_size"] // config["num_attention_heads"]
        if config["query_pre_attn_scalar"] != width:
            return f"query_pre_attn_scalar={config['query_pre_attn_scalar']}, not {width}"
        kinds = ["sliding_attention" if (block + 1) % period else "full_attention" for block in range(count)]
        given = config.get("layer_types") or kinds
        return None if given == kinds else f"another order of layer_types than full attention every {period} blocks"

    return check


def _smollm3(config: Mapping[str, Any]) -> str | None:
    rotary = [int((block + 1) % 4 != 0) for block in range(config["num_hidden_layers"])]
    given = config.get("no_rope_layers") or rotary
    return None if given == rotary else "another order of no_rope_layers than every fourth block"


GRANITE = {
    "add_attention_scale": "attention_multiplier",
    "add_embedding_scale": "embedding_multiplier",
    "add_residual_scale": "residual_multiplier",
    "add_logit_scale": "logits_scaling",
}
_gemma_of = partial(GgufArchitecture, offset=1, activation="gelu")
CAPS = {
    "add_attn_logit_softcapping": "attn_logit_softcapping",
    "add_final_logit_softcapping": "final_logit_softcapping",
}
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", interleaved=True),
    "mistral": GgufArchitecture("llama", interleaved=True),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma": _gemma_of("gemma"),
    "gemma2": _gemma_of("gemma2", numbers=CAPS, windows=True, check=_gemma(2)),
    "gemma3_text": _gemma_of("gemma3", windows=True, check=_gemma(6)),
    "granite": GgufArchitecture("granite", interleaved=True, numbers=GRANITE),
    "olmo2": GgufArchitecture("olmo2"),
    "phi3": GgufArchitecture("phi3"),
    "smollm3": GgufArchitecture("smollm3", interleaved=True, check=_smollm3),
}
"""By `model_type` of config.json."""


def architecture_of(config: Mapping[str, Any]) -> GgufArchitecture:
    """The architecture of a config.json. ConfigError if epmq does not write it as GGUF."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"GGUF is written for {', '.join(ARCHITECTURES)}, got the model type {kind}")
    found = ARCHITECTURES[str(kind)]
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in GATED[found.activation]:
        raise ConfigError(f"llama.cpp computes {kind} with {found.activation}, got {activation} in config.json")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ConfigError(f"GGUF is written for rotary embeddings default, linear or llama3, got {rope['rope_type']}")
    if problem := found.check(config):
        raise ConfigError(f"llama.cpp has no {kind} with {problem}")
    return found


def metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Writes the keys of the architecture with a writer of the package gguf.

    Where llama.cpp has no sliding window for a model that has one, the context is as long as the window, because
    within it both compute the same.
    """
    found, width, rope = ARCHITECTURES[config["model_type"]], head_width(config), _rope(config)
    length, window = config["max_position_embeddings"], _window(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(min(length, window) if window and not found.windows else length)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    for method, key in found.numbers.items():
        if config.get(key) is not None:
            getattr(writer, method)(float(config[key]))
    if found.windows or found.name == "phi3":  # which has none if it is 0
        writer.add_sliding_window(window if found.windows else 0)
    if "sliding_attention" in (parts := config.get("rope_parameters") or {}):
        writer.add_rope_freq_base_swa(float(parts["sliding_attention"]["rope_theta"]))
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
    given = given.get("full_attention", given)
    kind = {"rope_type": given["type"]} if "type" in given else {}
    return {**older, **kind, **given}


def _window(config: Mapping[str, Any]) -> int:
    """The tokens that attention looks back; 0 for all."""
    used = config.get("use_sliding_window", True)
    return int(config.get("sliding_window") or 0) if used else 0
