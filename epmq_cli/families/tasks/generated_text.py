"""Tasks whose answers a model generates as text. Experts have no heads of their own.

A task has a prompt and answers. During calibration the decoder reads the answers that the task's expert generates, so
no labels are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import ALL, Batch, Collate, split
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, ModelError, first_line, literal
from epmq_cli.families.processors import own_tokenizer, tokens
from epmq_cli.families.tasks.adapter import Features, Head, Predict, TaskAdapter
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    from torch import Tensor, nn

ANSWER = 10  # maximum tokens of an answer, including the start token, as in the published protocol


class GeneratedText(TaskAdapter):
    """Classification, or regression, by generated text."""

    answers = True
    vocabulary = True
    sample_types = (str, tuple)
    metrics = ("accuracy", "matthews", "spearman")

    def check_task(self, task: Task) -> None:
        """Requires classes, unless the answers are numbers."""
        if not task.classes and task.metric != "spearman":
            raise ConfigError(
                f"suite.tasks.{task.name}.classes must be the answers in label order for the metric {task.metric}, "
                f"got {literal(task.classes)}"
            )

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pads prompts to the longest of the batch, and cuts them at the task's `max_length` tokens."""
        tokenizer = tokens(folder, processor=processor)

        def collate(texts: list[Any]) -> Batch:
            encoding = tokenizer(texts, padding=True, truncation=True, max_length=task.max_length)
            return {name: encoding[name] for name in ("input_ids", "attention_mask")}

        return collate

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """The batch with the decoder's inputs for the answers of the model: `decoder_input_ids` and
        `decoder_attention_mask`, both (samples, tokens)."""
        answers = [answer for part in split(batch, samples) for answer in _answers(model, part)]
        settings: Any = model.generation_config
        tokens = torch.nn.utils.rnn.pad_sequence(
            answers, batch_first=True, padding_value=settings.pad_token_id
        )  # as the model pads
        ended = (tokens == _end(model)).cumsum(1) > 0
        ended[:, 0] = False  # the start token is not an end, even with the same id
        mask = ~ended[:, :-1]
        return {**batch, "decoder_input_ids": tokens[:, :-1], "decoder_attention_mask": mask.long()}

    def predict(self, features: Features, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Predicts the class whose answer the model writes exactly, else -1; without classes the number, else 0."""
        tokenizer = own_tokenizer(folder, processor)
        classes = {name: index for index, name in enumerate(task.classes or ())}

        def predict(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            texts = tokenizer.batch_decode(_answers(model, batch), skip_special_tokens=True)
            if not classes:
                return torch.tensor([_number(text) for text in texts])
            return torch.tensor([classes.get(text.strip(), -1) for text in texts])

        return predict


def _answers(model: Any, batch: Batch) -> Tensor:
    """The generated tokens (samples, tokens), the decoder's start token first."""
    _check_answering(model)
    try:
        answers: Tensor = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=ANSWER,
            do_sample=False,
            num_beams=1,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # its settings may hold anything
        reason = first_line(error)
        raise ModelError(
            f"the base cannot generate answers by its generation_config.json or config.json ({reason}); fetch it again"
        ) from error
    return answers


def _check_answering(model: Any) -> None:
    """Raises ModelError if the start, end or padding token of answers is not one of the model's tokens."""
    settings = model.generation_config
    ids = {name: getattr(settings, name) for name in ("decoder_start_token_id", "pad_token_id")}
    for name, number in {**ids, "eos_token_id": model.config.eos_token_id}.items():
        if not isinstance(number, int) or not 0 <= number < model.config.vocab_size:
            raise ModelError(
                f"the generation_config.json or config.json of the base has a {name} of {literal(number)}, which must "
                f"be one of the model's {model.config.vocab_size} tokens; fetch it again"
            )


def _end(model: Any) -> int:
    end: int = model.config.eos_token_id
    return end


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
