"""Decoder-only language models built of attention and a feed-forward, such as Llama, Qwen, Mistral, Gemma and Phi.

Base and experts: whatever `AutoModelForCausalLM` loads, of one architecture, whose blocks consist of the linears named
below. The model's own blocks are called with its own masks and positions, so rotary embeddings, grouped queries and
sliding windows are what they are there. Tables and the output layer stay dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.pretrained import from_folder
from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Batch, Collate, LanguageModel, Linears, Norm, Section, Table
from epmq_cli.families.parts import LastNorm, block_settings
from epmq_cli.families.processors import tokens
from epmq_cli.suites import Task

PREFIX = "model."
LAYERS = "model.layers"
SEPARATOR = "\n\n"  # between documents, as in the usual protocol of perplexity on WikiText
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")
SETTINGS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
)


def block_steps(block: nn.Module, where: str) -> tuple[Linears | Norm, ...]:
    """The steps of a block in the order of its forward pass, from the names of its modules.

    Gemma 2 and 3 norm what attention and feed-forward give before it is added to the stream: there the linears write
    into no stream. ModelError where a block has other linears, such as the experts of a mixture.
    """
    names = {name for name, _ in block.named_modules()}
    sandwich = "pre_feedforward_layernorm" in names
    fused = "self_attn.qkv_proj" in names
    reading = ("self_attn.qkv_proj",) if fused else QKV
    before = next((name for name in BEFORE_MLP if name in names), BEFORE_MLP[-1])
    inner = ("mlp.gate_up_proj",) if "mlp.gate_up_proj" in names else ("mlp.gate_proj", "mlp.up_proj")
    steps: list[Linears | Norm] = [
        Norm("input_layernorm"),
        Linears(reading),
        Linears(("self_attn.o_proj",), stream=None if sandwich else "input_layernorm"),
        *([Norm("post_attention_layernorm")] if sandwich else []),
        Norm(before),
        Linears(inner),
        Linears(("mlp.down_proj",), stream=None if sandwich else before),
        *([Norm("post_feedforward_layernorm")] if sandwich else []),
    ]
    known = {name for step in steps for name in (step.names if isinstance(step, Linears) else (step.name,))}
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    odd = sorted((known - names) | (linears - known))
    if odd:
        raise ModelError(
            f"base: {where} is not built of attention and one feed-forward as family causal_lm knows them ("
            f"{odd[0]} is {'missing' if odd[0] not in names else 'not known'}); write a family of its own, a module in "
            "epmq_cli/families"
        )
    return tuple(steps)


class CausalLM(LanguageModel):
    """`family: causal_lm`."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3")
    heads = "none"
    dequantize_on_load = True  # exporters such as that of ONNX read linears before the model is first called
    stem = (Table("model.embed_tokens"),)

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors, but for an output layer that is tied to the table; models without one lack the prefix."""
        tied = folder.config.get("tie_word_embeddings", False)
        prefixed = any(name.startswith(PREFIX) for name in folder.infos)
        names = {name if prefixed else PREFIX + name: name for name in folder.infos}
        return {
            name: stored
            for name, stored in names.items()
            if not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq")
        }

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the blocks, their positions and masks."""
        return block_settings(folder, names=SETTINGS)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The model with its output layer."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = from_folder(AutoModelForCausalLM, folder, **options)
        return model

    def blocks(self, model: nn.Module) -> list[Section]:
        """The layers; ModelError where they are not what this family knows."""
        try:
            layers = model.get_submodule(LAYERS)
        except AttributeError:
            raise ModelError(
                f"base: {type(model).__name__} has no {LAYERS}, which family causal_lm walks; a family of its own is a "
                "module in epmq_cli/families"
            ) from None
        return [
            Section(f"{LAYERS}.{index}", layer, block_steps(layer, f"{LAYERS}.{index} of {type(model).__name__}"))
            for index, layer in layers.named_children()
        ]

    def readout(self, model: nn.Module) -> Section:
        """The last norm."""
        return LastNorm.section(model, "model.norm")

    def collate(self, folder: Path, task: Task) -> Collate:
        """Sequences of one length."""

        def collate(sequences: list[Any]) -> Batch:
            return {"input_ids": torch.stack(sequences)}

        return collate

    def tokens(self, folder: Path, documents: Sequence[str]) -> Tensor:
        """The tokens of all documents, two line breaks between them; the tokenizer's own start token comes once."""
        ids: Tensor = tokens(folder)(SEPARATOR.join(documents), verbose=False)["input_ids"][0]
        return ids

    def token_logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Those of the output layer, in float32."""
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last norm's output: (tokens, width)."""
        hidden: Tensor = model.get_submodule("model")(**batch, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)
