"""T5 and FLAN-T5 (https://arxiv.org/abs/2210.11416) in the form that transformers has.

Base and experts: `T5ForConditionalGeneration`. Encoder, decoder and embeddings are merged. The linears of all blocks
are quantized, those of cross-attention too; embeddings, position biases and the output layer stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.families.architecture import Architecture
from epmq_cli.families.family import Family
from epmq_cli.families.parts import block_settings
from epmq_cli.families.structure import Linears, Norm, Section, Stack, Table
from epmq_cli.families.tasks.generated_text import GeneratedText
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


def attention_steps(part: str, name: str, memory: bool) -> Iterator[Linears | Norm]:
    """The steps of an attention, which reads the encoder's output where `memory`."""
    norm, (q, k, v, o) = f"{part}.layer_norm", (f"{part}.{name}.{letter}" for letter in "qkvo")
    yield Norm(norm, mixing=not memory)
    if memory:
        yield Linears((q,), producer=norm)
        yield Linears((k, v), memory=True)
    else:
        yield Linears((q, k, v), mixing=(k, v), producer=norm)
    yield Linears((o,), stream=norm, producer=v)


def block_steps(block: nn.Module) -> tuple[Linears | Norm, ...]:
    """The steps of a block: of the encoder with two parts, or of the decoder with three."""
    parts = [name for name, _ in block.get_submodule("layer").named_children()]
    steps = list(attention_steps("layer.0", "SelfAttention", memory=False))
    if len(parts) > 2:
        steps += attention_steps("layer.1", "EncDecAttention", memory=True)
    norm, inner = f"layer.{parts[-1]}.layer_norm", f"layer.{parts[-1]}.DenseReluDense"
    gated = tuple(f"{inner}.{name}" for name, _ in block.get_submodule(inner).named_children() if name.startswith("wi"))
    producer = gated[1] if len(gated) > 1 else None  # wi_1, which wi_0 gates
    down = Linears((f"{inner}.wo",), stream=norm, producer=producer)
    return (*steps, Norm(norm), Linears(gated, producer=norm), down)


@dataclass(frozen=True, kw_only=True)
class T5(Architecture):
    """`family: t5`."""

    name: str = "t5"
    model_types: tuple[str, ...] = ("t5",)
    unsolved: tuple[str, ...] = (
        r"(encoder|decoder)\.block\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"(decoder\.embed_tokens|lm_head)\.weight",
    )
    dequantize_on_load: bool = True  # its feed-forward reads wo.weight
    mixes_formats: bool = False  # its _init_weights reads the weights of packed linears

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors."""
        self.check_type(folder)
        return self.all_names(folder)

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings of both stacks, the scale of the output, and the tokens that answers start and end with."""
        names = ("num_heads", "feed_forward_proj", "layer_norm_epsilon", "relative_attention_num_buckets", "d_kv")
        answers = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        settings = block_settings(folder, names=(*names, "scale_decoder_outputs", *answers))
        if settings["decoder_start_token_id"] is None:  # as in T5's training
            settings["decoder_start_token_id"] = settings["pad_token_id"]
        return settings

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A T5ForConditionalGeneration."""
        from transformers import T5ForConditionalGeneration

        model: nn.Module = from_folder(T5ForConditionalGeneration, folder, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The encoder, and the decoder whose cross-attention reads the encoder's output."""
        from epmq_cli.families.readouts import LastNorm  # a module: imports torch

        return [
            Stack(
                _blocks(model, "encoder"),
                LastNorm.section(model, "encoder.final_layer_norm"),
                stem=(Table("shared", reader="encoder.embed_tokens"),),
                mask=_mask("attention_mask"),
                handed="encoder_outputs",
            ),
            Stack(
                _blocks(model, "decoder"),
                LastNorm.section(model, "decoder.final_layer_norm"),
                mask=_mask("decoder_attention_mask"),
                memory=_mask("attention_mask"),
            ),
        ]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of the decoder for each real token of the answers: (tokens, width)."""
        memory = batch.get("encoder_outputs")
        if memory is None:
            encoder = model.get_submodule("encoder")
            memory = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        hidden: Tensor = model.get_submodule("decoder")(
            input_ids=batch["decoder_input_ids"],
            attention_mask=batch["decoder_attention_mask"],
            encoder_hidden_states=memory,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        return hidden[batch["decoder_attention_mask"].bool()]


def _blocks(model: nn.Module, stack: str) -> list[Section]:
    blocks = model.get_submodule(f"{stack}.block")
    return [Section(f"{stack}.block.{index}", block, block_steps(block)) for index, block in blocks.named_children()]


def _mask(key: str) -> Any:
    return lambda batch: batch[key].bool()


T5_FAMILY = Family(T5(), GeneratedText())
