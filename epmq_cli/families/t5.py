"""T5 and FLAN-T5 (https://arxiv.org/abs/2210.11416) as transformers has them: encoder, decoder and tables are merged.

Base and experts: `T5ForConditionalGeneration`. A task is a prompt and answers; experts have no heads of their own. What
the decoder reads while it is calibrated are the answers that the task's expert itself gives, so that no labels are
used. The linears of all blocks are quantized, those of cross-attention too; tables, position biases and the output
layer stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from epmq_cli.data.batching import ALL, Batch, Collate, split
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, ModelError, first_line, shown
from epmq_cli.families.family import Family, Head, Predict
from epmq_cli.families.parts import LastNorm, block_settings
from epmq_cli.families.processors import own_tokenizer, tokens
from epmq_cli.families.structure import Linears, Norm, Section, Stack, Table
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder
from epmq_cli.models.processor_folder import Processor

ANSWER = 10  # tokens that an answer has at most, the start counted, as in the published protocol


def attention_steps(part: str, name: str, memory: bool) -> Iterator[Linears | Norm]:
    """The steps of one attention: of the decoder on the encoder's output where `memory`."""
    norm, (q, k, v, o) = f"{part}.layer_norm", (f"{part}.{name}.{letter}" for letter in "qkvo")
    yield Norm(norm, mixing=not memory)
    if memory:
        yield Linears((q,), producer=norm)
        yield Linears((k, v), memory=True)
    else:
        yield Linears((q, k, v), mixing=(k, v), producer=norm)
    yield Linears((o,), stream=norm, producer=v)


def block_steps(block: nn.Module) -> tuple[Linears | Norm, ...]:
    """The steps of a block of the encoder (two parts) or the decoder (three)."""
    parts = [name for name, _ in block.get_submodule("layer").named_children()]
    steps = list(attention_steps("layer.0", "SelfAttention", memory=False))
    if len(parts) > 2:
        steps += attention_steps("layer.1", "EncDecAttention", memory=True)
    norm, inner = f"layer.{parts[-1]}.layer_norm", f"layer.{parts[-1]}.DenseReluDense"
    gated = tuple(f"{inner}.{name}" for name, _ in block.get_submodule(inner).named_children() if name.startswith("wi"))
    producer = gated[1] if len(gated) > 1 else None  # wi_1, which wi_0 gates
    down = Linears((f"{inner}.wo",), stream=norm, producer=producer)
    return (*steps, Norm(norm), Linears(gated, producer=norm), down)


class T5(Family):
    """`family: t5`."""

    model_types = ("t5",)
    kept = (
        r"(encoder|decoder)\.block\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"(decoder\.embed_tokens|lm_head)\.weight",
    )
    heads = "none"
    answers = True
    sample_types = (str, tuple)
    metrics = ("accuracy", "matthews", "spearman")
    dequantize_on_load = True  # its feed-forward reads wo.weight
    mixes_formats = False  # its _init_weights reads the weights of packed linears

    def check_task(self, task: Task) -> None:
        """Classes, unless the answers are numbers."""
        if not task.classes and task.metric != "spearman":
            raise ConfigError(
                f"suite.tasks.{task.name}.classes must be the answers in label order for the metric {task.metric}, "
                f"got {shown(task.classes)}"
            )

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """All tensors."""
        self.check_type(folder)
        return self.all_names(folder)

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of both stacks, the scale of the output, and the tokens that answers start and end with."""
        names = ("num_heads", "feed_forward_proj", "layer_norm_epsilon", "relative_attention_num_buckets", "d_kv")
        answers = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        found = block_settings(folder, names=(*names, "scale_decoder_outputs", *answers))
        if found["decoder_start_token_id"] is None:  # as T5 was trained
            found["decoder_start_token_id"] = found["pad_token_id"]
        return found

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A T5ForConditionalGeneration."""
        from transformers import T5ForConditionalGeneration

        model: nn.Module = from_folder(T5ForConditionalGeneration, folder, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The encoder, whose output the decoder's cross-attention reads, and the decoder."""
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

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Prompts, padded to the longest of the batch and cut at the task's `max_length` tokens."""
        tokenizer = tokens(folder, processor=processor)

        def collate(texts: list[Any]) -> Batch:
            found = tokenizer(texts, padding=True, truncation=True, max_length=task.max_length)
            return {name: found[name] for name in ("input_ids", "attention_mask")}

        return collate

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """The batch with what the decoder read when the model gave its own answers: `decoder_input_ids` and
        `decoder_attention_mask`, both (samples, tokens)."""
        answers = [answer for part in split(batch, samples) for answer in _answers(model, part)]
        settings: Any = model.generation_config
        given = pad_sequence(answers, batch_first=True, padding_value=settings.pad_token_id)  # as the model itself does
        ended = (given == _end(model)).cumsum(1) > 0
        ended[:, 0] = False  # the token that starts an answer is no end of it, whatever it is
        read = ~ended[:, :-1]
        return {**batch, "decoder_input_ids": given[:, :-1], "decoder_attention_mask": read.long()}

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The decoder's output for each real token of the answers: (tokens, width)."""
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

    def predict(self, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """The class whose answer the model gives, to the letter, or -1; without classes the number it gives, or 0."""
        tokenizer = own_tokenizer(folder, processor)
        classes = {name: index for index, name in enumerate(task.classes or ())}

        def generated(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            texts = tokenizer.batch_decode(_answers(model, batch), skip_special_tokens=True)
            if not classes:
                return torch.tensor([_number(text) for text in texts])
            return torch.tensor([classes.get(text.strip(), -1) for text in texts])

        return generated


def _blocks(model: nn.Module, stack: str) -> list[Section]:
    blocks = model.get_submodule(f"{stack}.block")
    return [Section(f"{stack}.block.{index}", block, block_steps(block)) for index, block in blocks.named_children()]


def _mask(key: str) -> Any:
    return lambda batch: batch[key].bool()


def _answers(model: Any, batch: Batch) -> Tensor:
    """What the model generates: (samples, tokens), the first of them the decoder's start."""
    _check_answering(model)
    try:
        given: Tensor = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=ANSWER,
            do_sample=False,
            num_beams=1,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # its settings may be anything
        reason = first_line(error)
        raise ModelError(
            f"the generation_config.json or config.json of the base lets it give no answers ({reason}); fetch it again"
        ) from error
    return given


def _check_answering(model: Any) -> None:
    """ModelError where the tokens that answers start, end and are filled up with are none of the model's."""
    settings = model.generation_config
    ids = {name: getattr(settings, name) for name in ("decoder_start_token_id", "pad_token_id")}
    for name, number in {**ids, "eos_token_id": model.config.eos_token_id}.items():
        if not isinstance(number, int) or not 0 <= number < model.config.vocab_size:
            raise ModelError(
                f"the generation_config.json or config.json of the base has a {name} of {shown(number)}, which must be "
                f"one of the model's {model.config.vocab_size} tokens; fetch it again"
            )


def _end(model: Any) -> int:
    end: int = model.config.eos_token_id
    return end


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
