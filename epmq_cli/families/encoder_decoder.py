"""Encoder-decoders of transformers: two stacks of blocks, the second of which reads the first by cross-attention.

Base and experts: models of one architecture that answer in tokens, such as `T5ForConditionalGeneration`. Encoder,
decoder and embeddings are merged. The linears of all blocks are quantized, those of cross-attention too; embeddings,
positions and the output layer stay dense. A new one is a row, such as bart.py: the parts of the model are found by
structure. Stacks with a norm behind their last block have norms in front of the parts of their blocks, others behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ModelError
from epmq_cli.families.architecture import Architecture
from epmq_cli.families.encoder_decoder_steps import UNSOLVED as IN_BLOCKS
from epmq_cli.families.encoder_decoder_steps import block_steps
from epmq_cli.families.parts import block_settings
from epmq_cli.families.refusal import refused
from epmq_cli.families.structure import Section, Stack, Table
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = ("block", "layers")
"""The names of the list of blocks: of T5, of BART."""
LAST_NORMS = ("final_layer_norm", "layer_norm")
"""The names of the norm behind the last block."""
FIRST_NORM, SHARED, TOKENS, POSITIONS = "layernorm_embedding", "shared", "embed_tokens", "embed_positions"
INPUTS = ("input_ids", "input_features", "attention_mask")
"""The inputs of encoders in a batch."""
UNSOLVED = (
    *(rf"[\w.]+\.\d+\.{part}" for part in IN_BLOCKS),
    rf"(model\.)?(encoder|decoder)\.({TOKENS}|{POSITIONS})\.weight",  # copies of a table; computed positions
    r"(lm_head|proj_out)\.weight",
    r"final_logits_bias",
)
"""Patterns of the tensors that no step solves."""
ANSWERS = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
"""The settings of the tokens that answers start and end with."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Architecture):
    """An encoder and a decoder."""

    loader: str = "AutoModelForSeq2SeqLM"
    """The class of transformers that loads the model."""

    shared: tuple[str, ...]
    """The settings that base and experts must share, besides the tokens that answers start and end with."""

    unsolved: tuple[str, ...] = UNSOLVED
    dequantize_on_load: bool = True  # encoder and decoder are called one after the other
    mixes_formats: bool = False  # T5's _init_weights reads packed linears; a mix stays packed, and `generate` fails

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors."""
        self.check_type(folder)
        return self.all_names(folder)

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings of both stacks, and the tokens that answers start and end with."""
        settings = block_settings(folder, names=(*self.shared, *ANSWERS))
        if settings["decoder_start_token_id"] is None:  # as in T5's training
            settings["decoder_start_token_id"] = settings["pad_token_id"]
        return settings

    def positions(self, folder: Path) -> int | None:
        """The tokens that a stack can read; None with relative positions."""
        config = config_of(folder)
        places = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
        return next((most for most in places if most is not None), None)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The model with its output layer."""
        import transformers

        model: nn.Module = from_folder(getattr(transformers, self.loader), folder, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The encoder, and the decoder whose cross-attention reads the encoder's output; ModelError where a block is
        not known."""
        read = _mask("attention_mask")
        return [
            self._stack(model, "encoder", mask=read, handed="encoder_outputs"),
            self._stack(model, "decoder", mask=_mask("decoder_attention_mask"), memory=read),
        ]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The output of the decoder for each real token of the answers: (tokens, width)."""
        prefix, memory = _prefix(model), batch.get("encoder_outputs")
        if memory is None:
            inputs = {name: batch[name] for name in INPUTS if name in batch}
            memory = model.get_submodule(f"{prefix}encoder")(**inputs).last_hidden_state
        masks = {"encoder_attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        hidden: Tensor = model.get_submodule(f"{prefix}decoder")(
            input_ids=batch["decoder_input_ids"],
            attention_mask=batch["decoder_attention_mask"],
            encoder_hidden_states=memory,
            use_cache=False,
            **masks,
        ).last_hidden_state
        return hidden[batch["decoder_attention_mask"].bool()]

    def _stack(self, model: nn.Module, side: str, **options: Any) -> Stack:
        from epmq_cli.families.readouts import AllTokens, LastNorm  # modules: import torch

        path, kind = f"{_prefix(model)}{side}", type(model).__name__
        parts = [name for name, _ in model.get_submodule(path).named_children()]
        layers, norm = (next((name for name in names if name in parts), None) for names in (LAYERS, LAST_NORMS))
        if layers is None:
            raise refused(self, f"{kind} has no {path}.{' or '.join(LAYERS)}")
        blocks = model.get_submodule(f"{path}.{layers}").named_children()
        try:
            sections = [
                Section(name, block, block_steps(block, norm is None, f"{name} of {kind}"))
                for name, block in ((f"{path}.{layers}.{index}", block) for index, block in blocks)
            ]
        except ModelError as error:
            raise refused(self, str(error)) from None
        readout = LastNorm.section(model, f"{path}.{norm}") if norm else Section("", AllTokens(), ())
        first = f"{path}.{FIRST_NORM}" if FIRST_NORM in parts else None
        return Stack(sections, readout, tuple(_tables(model, side, parts)), first, **options)


def _prefix(model: nn.Module) -> str:
    """The prefix of both stacks."""
    return "" if hasattr(model, "encoder") else "model."


def _tables(model: nn.Module, side: str, parts: Sequence[str]) -> list[Table]:
    """The tables of a stack. Both stacks may read one table of tokens; the tokens of the encoder count."""
    import torch

    prefix = _prefix(model)
    tables, path = list[Table](), f"{prefix}{side}"
    if not hasattr(model.get_submodule(prefix.rstrip(".")), SHARED):
        tables += [Table(f"{path}.{TOKENS}")] if TOKENS in parts else []
    elif side == "encoder":
        tables.append(Table(f"{prefix}{SHARED}", reader=f"{path}.{TOKENS}"))
    places = model.get_submodule(f"{path}.{POSITIONS}") if POSITIONS in parts else None
    if isinstance(places, torch.nn.Embedding) and "Sinusoidal" not in type(places).__name__:
        tables.append(Table(f"{path}.{POSITIONS}", numbered=True))
    return tables


def _mask(key: str) -> Any:
    return lambda batch: batch[key].bool() if key in batch else None
