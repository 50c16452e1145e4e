"""Tokenizers by byte-level BPE and of SentencePiece, and small decoders whose checkpoints can become GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from epmq_cli.checkpoint.gguf.tokenizer import SPACE
from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, by_group
from epmq_cli.quantize.formats.int import IntFormat
from tests.helpers.packs import exporter_of

TEXT = ["the film is a quiet story of a river, and 12 people's lives", "permission is granted, free of charge"] * 4
ROWS = 320
SIZE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW: dict[str, Any] = {**SIZE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE)),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZE, sliding_window=None)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZE)),
    "wide": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**{**SIZE, "hidden_size": 256, "intermediate_size": 256})),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, head_dim=32)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZE, head_dim=32, pad_token_id=None)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**WINDOW, pad_token_id=None)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**WINDOW, "num_hidden_layers": 6}, pad_token_id=None)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZE, **GRANITE)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZE, pad_token_id=None)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZE, sliding_window=32, pad_token_id=None)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**{**SIZE, "num_hidden_layers": 4}, pad_token_id=None)),
}
PIECES = ("gemma", "gemma2", "gemma3", "mistral", "phi3")
"""The models that get a tokenizer of SentencePiece."""


def write_tokenizer(folder: Path, split: str = "gpt-2", whole: bool = False) -> None:
    """Writes a tokenizer. `split`: a regular expression, or gpt-2 for that of ByteLevel itself. `whole`: whether
    words that are tokens stay whole."""
    made = Tokenizer(models.BPE(ignore_merges=whole))
    own = split == "gpt-2"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), level]
    made.pre_tokenizer = level if own else pre_tokenizers.Sequence(steps)  # type: ignore[arg-type]
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=ROWS - 10, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    t.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(folder)


def write_pieces(folder: Path, prefix: bool = True) -> None:
    """Writes a tokenizer of SentencePiece as transformers converts it. `prefix`: whether it puts a space in front of
    texts."""
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", SPACE)  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # type: ignore[assignment]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=ROWS - 10, special_tokens=special))
    vocab = made.get_vocab()
    tokens = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in special]
    cuts = ((token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token)))
    merges = [(left, right) for left, right in cuts if left in tokens and right in tokens]
    whole = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    both = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    whole.normalizer = both if prefix else replace  # type: ignore[assignment]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    t.PreTrainedTokenizerFast(tokenizer_object=whole, **named).save_pretrained(folder)


def write_decoder(
    folder: Path,
    kind: str,
    bits: int = 4,
    points: Literal["none", "whole"] = "none",
    group_size: int = 32,
    pack: str = "compressed_tensors",
) -> Path:
    """Writes a checkpoint of a small random decoder, rounded to nearest. Returns its folder."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        matrix = parameter.ndim > 1
        size = 1.6 / parameter.shape[1] ** 0.5 if matrix else 0.1
        parameter.data = torch.randn_like(parameter) * size + (not matrix)
    base = folder / "base"
    model.save_pretrained(base)
    (write_pieces if kind in PIECES else write_tokenizer)(base)
    format = IntFormat(bits, group_size, points)
    weights = {
        name: quantized(module.weight.detach(), format)
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear)
    }
    exporter = exporter_of(pack, dtype="float16")
    contents = Contents(exporter, model, weights, False, {}, base, {}, torch.float16)
    write_checkpoint(folder / "checkpoint", contents, 10**9)
    return folder / "checkpoint"


def quantized(weight: torch.Tensor, format: NumberFormat, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """A weight, rounded to nearest."""
    groups = by_group(weight, format)
    grid = format.fit(groups, "minmax", dtype)
    codes = format.encode(groups, grid.over_columns()).reshape(weight.shape)
    return QuantizedWeight(codes, grid, format, dtype)
