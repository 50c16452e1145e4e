"""Tasks of language models, which are calibrated on text or conversations, and scored by perplexity or by the answers
that they write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.answers import PROMPTS
from epmq_cli.data.batching import ALL, ANSWERS, Batch, Collate, split
from epmq_cli.data.chats import Chat, has_chats
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import TEXT_METRICS, Task
from epmq_cli.errors import DataError
from epmq_cli.families.processors import check_not_truncated, own_tokenizer, tokens
from epmq_cli.families.rendering import ASSISTANT, answer_ends, asked_ids, chat_ids, text_start
from epmq_cli.families.tasks.adapter import Decode, Features, Head, Predict, TaskAdapter
from epmq_cli.families.tasks.greedy import greedy_answers, left_padded
from epmq_cli.models.attention import cache_argument
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    from torch import Tensor, nn

SEPARATOR = "\n\n"  # between documents, as usual for perplexity on WikiText
DRAWS = "draws"
"""Numbers in [0, 1) in a batch of starts, one for each token that the expert writes: (samples, tokens)."""


class LanguageModel(TaskAdapter):
    """Language modeling."""

    pipeline = "text-generation"
    vocabulary = True
    metrics = ("perplexity", *TEXT_METRICS)
    sample_types = (str, Chat)
    consumed = (DRAWS,)

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Stacks token sequences of one length, or pads them to the longest, with their mask. Sequences (tokens, 2)
        also say which tokens are `ANSWERS`."""

        def collate(sequences: list[Any]) -> Batch:
            marked = sequences[0].ndim == 2
            parts = {"input_ids": [own[:, 0] if marked else own for own in sequences]}
            if not task.packing:
                parts["attention_mask"] = [torch.ones_like(ids) for ids in parts["input_ids"]]
            if marked:
                parts[ANSWERS] = [own[:, 1] for own in sequences]
            return {name: torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for name, each in parts.items()}

        return collate

    def scoring(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pads prompts in front."""
        return left_padded if task.metric in TEXT_METRICS else self.collate(folder, task, processor)

    def questions(self, folder: Path, task: Task, samples: Samples, processor: Processor | None = None) -> Samples:
        """Test samples for metrics of texts: the token ids (tokens,) of prompts, and the texts that answers are
        compared with. These are in a column, or the last message of each conversation. DataError if a sample has no
        such text, or a longer prompt than `max_length`. `folder` and `processor` as for `collate`."""
        asked, references = samples.inputs, samples.references
        if references is None:
            asked, references = zip(*(_question(task.name, document) for document in samples.inputs), strict=True)
        prompts = asked_ids(folder, asked, processor) if has_chats(asked) else self.each(folder, asked, processor)
        longest = max(map(len, prompts))
        if longest > task.max_length:
            raise DataError(
                f"task {task.name}: its longest prompt has {longest} tokens, more than "
                f"suite.tasks.{task.name}.max_length={task.max_length}; raise that, or leave the prompt out"
            )
        return Samples(prompts, references=references)

    def predict(self, features: Features, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Predicts the tokens of answers (samples, `answer_length`), for metrics of texts."""
        if task.metric not in TEXT_METRICS:
            return super().predict(features, folder, task, processor)
        written = answer_ends(folder, processor)

        def predict(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            return greedy_answers(model, batch, task.written, written | _own_ends(model))

        return predict

    def decode(self, folder: Path, task: Task, processor: Processor | None = None) -> Decode | None:
        """Returns the function that turns tokens into texts, for metrics of texts."""
        if task.metric not in TEXT_METRICS:
            return None
        tokenizer = own_tokenizer(folder, processor)
        return lambda tokens: list(tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def tokens(
        self, folder: Path, documents: Sequence[str], processor: Processor | None = None, answers: bool = False
    ) -> Tensor:
        """The token ids (tokens,) of all documents, joined by two line breaks, with one start token if the tokenizer
        has one; of conversations the token ids of each as its chat template writes it. `folder` and `processor` as for
        `collate`, `answers` as for `chat_ids`; all tokens of other texts count as answers."""
        if has_chats(documents):
            return torch.cat(self.each(folder, documents, processor, answers))
        return self.each(folder, [SEPARATOR.join(documents)], processor, answers)[0]

    def each(
        self, folder: Path, documents: Sequence[str], processor: Processor | None = None, answers: bool = False
    ) -> list[Tensor]:
        """The token ids (tokens,) of each document or conversation, see `tokens`."""
        chats = [document for document in documents if isinstance(document, Chat)]
        talks = iter(chat_ids(folder, chats, processor, answers) if chats else ())
        encode, found = tokens(folder, processor=processor), []
        for document in documents:
            if isinstance(document, Chat):
                found.append(next(talks))
                continue
            ids = encode(document, verbose=False)["input_ids"][0]
            check_not_truncated(processor.folder if processor else folder, [document], len(ids))
            found.append(torch.stack([ids, torch.ones_like(ids)], 1) if answers else ids)
        return found

    def scored(self, folder: Path, task: Task, documents: Sequence[str], processor: Processor | None = None) -> Tensor:
        """The token ids (tokens,) of all test documents; with `assistant_only_loss` (tokens, 2), see `tokens`.
        DataError if they then have no answers. `folder` and `processor` as for `collate`."""
        ids = self.tokens(folder, documents, processor, task.assistant_only_loss)
        if task.assistant_only_loss and not (has_chats(documents) and bool(ids[:, 1].any())):
            kind = PROMPTS if has_chats(documents) else "texts"
            raise DataError(
                f"task {task.name}: its test samples are {kind}, and suite.tasks.{task.name}.assistant_only_loss=true "
                "counts the assistant's answers in conversations; give conversations that have them, or set it to false"
            )
        return ids

    def starts(self, folder: Path, task: Task, count: int, seed: int, processor: Processor | None = None) -> Batch:
        """The starts of `count` texts of `max_length` tokens, which `complete` continues: what the chat template writes
        in front of a user's words, or the start token. `folder` and `processor` as for `collate`."""
        start = text_start(folder, processor)[: task.max_length - 1]
        draws = torch.rand(
            count, task.max_length - len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return {"input_ids": start.expand(count, -1), DRAWS: draws}

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """The batch with the model's own texts, if it is one of `starts`: each token is sampled from the model's
        probabilities. The end of a text does not stop it; a model of conversations goes on with the answer."""
        if DRAWS not in batch:
            return batch
        with torch.inference_mode():
            return {"input_ids": torch.cat([_written(model, part) for part in split(batch, samples)])}

    def token_logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The logits (samples, tokens, vocabulary) in float32 of the token after each of `ids` (samples, tokens)."""
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()


def _written(model: nn.Module, batch: Batch) -> Tensor:
    """The starts with the tokens that the model writes, (samples, tokens)."""
    ids, fed, cache = batch["input_ids"], batch["input_ids"], None
    name = str(cache_argument(model))
    for draw in batch[DRAWS].T:
        output = model(input_ids=fed, use_cache=True, **{name: cache})
        chances, cache = output.logits[:, -1].double().softmax(-1).cumsum(-1), getattr(output, name)
        places = torch.searchsorted(chances, draw[:, None] * chances[:, -1:], right=True)
        fed = places.clamp(max=chances.shape[1] - 1)
        ids = torch.cat([ids, fed], 1)
    return ids


def _question(task: str, document: Any) -> tuple[Chat, str]:
    """A conversation without its last message, and that message."""
    where = "its test samples are texts, not conversations"
    if isinstance(document, Chat):
        *asked, last = document.messages
        if asked and last["role"] == ASSISTANT:
            return Chat(asked, document.where, document.tools), str(last["content"])
        where = f"{document.where} does not end with an answer of the assistant"
    raise DataError(
        f"task {task}: {where}, so there is nothing to compare answers with; name the column of the answers in "
        "data.answer of a Table or a Hub, or end the conversations with the answer"
    )


def _own_ends(model: Any) -> set[int]:
    """The tokens at which the model ends a text by its generation_config.json."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else {*ends}
