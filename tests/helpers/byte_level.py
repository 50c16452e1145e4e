"""A tokenizer by byte-level BPE, as decoders have, and small decoders whose checkpoints can become GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from epmq_cli.checkpoint.write import Contents, write_checkpoint
from epmq_cli.quantize.formats.format import QuantizedWeight, by_group
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
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE)),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZE, sliding_window=None)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZE)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZE, head_dim=32)),
}


def write_tokenizer(folder: Path, split: str = "gpt-2") -> None:
    """Writes a tokenizer. `split`: a regular expression, or gpt-2 for the one of ByteLevel itself."""
    made = Tokenizer(models.BPE())
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
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1)
    base = folder / "base"
    model.save_pretrained(base)
    write_tokenizer(base)
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


def quantized(weight: torch.Tensor, format: IntFormat) -> QuantizedWeight:
    """A weight, rounded to nearest."""
    groups = by_group(weight, format)
    grid = format.fit(groups, "minmax", torch.float16)
    codes = format.encode(groups, grid.over_columns()).reshape(weight.shape)
    return QuantizedWeight(codes, grid, format, torch.float16)
