"""Tasks of language models, which are calibrated on text or conversations and scored by perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.chats import Chat
from epmq_cli.data.suite import Task
from epmq_cli.families.processors import check_not_truncated, tokens
from epmq_cli.families.rendering import chat_ids
from epmq_cli.families.tasks.adapter import TaskAdapter
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    from torch import Tensor, nn

SEPARATOR = "\n\n"  # between documents, as usual for perplexity on WikiText


class LanguageModel(TaskAdapter):
    """Language modeling."""

    pipeline = "text-generation"
    metrics = ("perplexity",)
    sample_types = (str, Chat)

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Stacks token sequences of one length."""

        def collate(sequences: list[Any]) -> Batch:
            return {"input_ids": torch.stack(sequences)}

        return collate

    def tokens(self, folder: Path, documents: Sequence[str], processor: Processor | None = None) -> Tensor:
        """The token ids (tokens,) of all documents, joined by two line breaks, with one start token if the tokenizer
        has one; of conversations the token ids of each as its chat template writes it. `folder` and `processor` as for
        `collate`."""
        chats = [document for document in documents if isinstance(document, Chat)]
        if chats:
            return torch.cat(chat_ids(folder, chats, processor))
        encode = tokens(folder, processor=processor)
        ids: Tensor = encode(SEPARATOR.join(documents), verbose=False)["input_ids"][0]
        check_not_truncated(processor.folder if processor else folder, documents, len(ids))
        return ids

    def token_logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The logits (samples, tokens, vocabulary) in float32 of the token after each of `ids` (samples, tokens)."""
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()
