"""Tasks whose answers a model generates as text. Experts have no heads of their own.

A task has a prompt, and answers that name classes or are compared with texts. During calibration the decoder reads the
answers that the task's expert generates, so no labels are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from epmq_cli.data.batching import ALL, Batch, Collate, split, without
from epmq_cli.data.suite import ANSWER, TEXT_METRICS, Task
from epmq_cli.errors import ConfigError, ModelError, first_line, literal
from epmq_cli.families.processors import own_tokenizer, tokens
from epmq_cli.families.tasks.adapter import Decode, Features, Head, Predict, TaskAdapter
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOM = "room"
"""Zeros in a batch, one for each token that an answer may have, unless these are ANSWER: (samples, tokens)."""


class GeneratedText(TaskAdapter):
    """Classification, regression, or writing by generated text."""

    answers = True
    vocabulary = True
    sample_types: ClassVar[tuple[type, ...]] = (str, tuple)
    metrics = ("accuracy", "matthews", "spearman", *TEXT_METRICS)
    consumed = (ROOM,)

    def check_task(self, task: Task) -> None:
        """Requires classes, unless the answers are numbers or compared with texts."""
        if task.metric in TEXT_METRICS:
            if task.classes:
                raise ConfigError(
                    f"suite.tasks.{task.name}.classes are for answers that name classes, got the metric {task.metric}, "
                    "which compares texts; leave out classes, or use metric: accuracy"
                )
        elif not task.classes and task.metric != "spearman":
            raise ConfigError(
                f"suite.tasks.{task.name}.classes must be the answers in label order for the metric {task.metric}, "
                f"got {literal(task.classes)}"
            )

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pads prompts to the longest of the batch, and cuts them at the task's `max_length` tokens."""
        tokenizer = tokens(folder, processor=processor)

        def collate(texts: list[Any]) -> Batch:
            encoding = tokenizer(texts, padding=True, truncation=True, max_length=task.max_length)
            batch = {name: encoding[name] for name in ("input_ids", "attention_mask")}
            return {**batch, **room(task, len(texts))}

        return collate

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """The batch with the decoder's inputs for the answers of the model: `decoder_input_ids` and
        `decoder_attention_mask`, both (samples, tokens)."""
        answers = [answer for part in split(batch, samples) for answer in self.written(model, part)]
        settings: Any = model.generation_config
        tokens = torch.nn.utils.rnn.pad_sequence(
            answers, batch_first=True, padding_value=settings.pad_token_id
        )  # as the model pads
        ended = (tokens == _end(model)).cumsum(1) > 0
        ended[:, 0] = False  # the start token is not an end, even with the same id
        mask = ~ended[:, :-1]
        prompt = without(batch, self.consumed)
        return {**prompt, "decoder_input_ids": tokens[:, :-1], "decoder_attention_mask": mask.long()}

    def predict(self, features: Features, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Predicts the class whose answer the model writes exactly, else -1; without classes the number, else 0. For
        metrics of texts predicts the tokens of the answer (samples, `answer_length`)."""
        if task.metric in TEXT_METRICS:
            return lambda model, batch, head: _padded(model, self.written(model, batch), task.written)
        tokenizer = self.tokenizer(folder, processor)
        classes = {name: index for index, name in enumerate(task.classes or ())}

        def predict(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            texts = tokenizer.batch_decode(self.written(model, batch), skip_special_tokens=True)
            if not classes:
                return torch.tensor([_number(text) for text in texts])
            return torch.tensor([classes.get(text.strip(), -1) for text in texts])

        return predict

    def decode(self, folder: Path, task: Task, processor: Processor | None = None) -> Decode | None:
        """Returns the function that turns tokens into texts, for metrics of texts."""
        if task.metric not in TEXT_METRICS:
            return None
        tokenizer = self.tokenizer(folder, processor)
        return lambda tokens: list(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def written(self, model: Any, batch: Batch) -> Tensor:
        """The generated tokens (samples, tokens), the decoder's start token first."""
        _check_answering(model)
        try:
            return self.generate(
                model, without(batch, self.consumed), batch[ROOM].shape[1] if ROOM in batch else ANSWER
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # its settings may hold anything
            raise ModelError(
                "the base cannot generate answers by its generation_config.json or config.json "
                f"({first_line(error)}); fetch it again"
            ) from error

    def generate(self, model: Any, batch: Batch, length: int) -> Tensor:
        """Answers of at most `length` tokens, the most likely token each time."""
        answers: Tensor = model.generate(**batch, max_length=length, do_sample=False, num_beams=1)
        return answers

    def tokenizer(self, folder: Path, processor: Processor | None) -> Any:
        """The tokenizer of answers."""
        return own_tokenizer(folder, processor)


def room(task: Task, samples: int) -> Batch:
    """What says in a batch how long the answers of a task may be."""
    return {} if task.written == ANSWER else {ROOM: torch.zeros(samples, task.written, dtype=torch.uint8)}


def _padded(model: Any, answers: Tensor, length: int) -> Tensor:
    """The answers with padding tokens up to a length."""
    added = length - answers.shape[1]
    padded: Tensor = torch.nn.functional.pad(answers, (0, added), value=model.generation_config.pad_token_id)
    return padded


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
