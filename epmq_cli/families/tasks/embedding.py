"""Tasks of sentence embeddings: how alike two texts are, and which documents answer a query. There are no heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.ranking import RANKINGS
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Task
from epmq_cli.errors import ModelError, literal
from epmq_cli.families.processors import tokens
from epmq_cli.families.tasks.adapter import Features, Head, Predict, TaskAdapter
from epmq_cli.models.processor_folder import Processor
from epmq_cli.models.sentence_folder import DENSE, WEIGHTS, SentenceFolder
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

IDENTITY = "Identity"


class Embedding(TaskAdapter):
    """Embeddings of texts as a folder of sentence-transformers makes them. Pairs of texts are compared; a sample of one
    text is embedded."""

    pipeline = "sentence-similarity"
    numbers = True
    sample_types = (str, tuple)
    metrics = ("spearman", "pearson", *RANKINGS)

    def __init__(self, sentences: SentenceFolder) -> None:
        self.sentences = sentences

    def in_head(self, name: str) -> bool:
        """BERT's pooler belongs to no task either: embeddings do not read it."""
        return name.startswith("pooler.")

    def worded(self, task: Task, samples: Samples) -> Samples:
        """The samples with the prompts of the model: of queries and documents, or the usual one."""
        own = self.sentences
        prompts = (own.query, own.document) if task.metric in RANKINGS else (own.usual, own.usual)

        def prompted(sample: Any) -> Any:
            if isinstance(sample, str):
                return own.usual + sample
            return tuple(prompt + text if text else text for prompt, text in zip(prompts, sample, strict=True))

        return replace(samples, inputs=[prompted(sample) for sample in samples.inputs])

    def calibrating(self, task: Task, samples: Samples, count: int) -> Samples:
        """The first `count` texts: those of pairs one by one, each once."""
        worded = self.worded(task, samples).inputs
        texts = [text for sample in worded for text in ((sample,) if isinstance(sample, str) else sample) if text]
        return Samples([*dict.fromkeys(texts)][:count])

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pads texts to the longest of the batch, and cuts them at `max_length` tokens, or the model's own limit if it
        is lower. Pairs become tensors (samples, 2, tokens)."""
        own, tokenizer = self.sentences, tokens(folder, processor=processor)
        longest = task.max_length if own.longest is None else min(task.max_length, own.longest)

        def collate(samples: list[Any]) -> Batch:
            texts = [text for sample in samples for text in ((sample,) if isinstance(sample, str) else sample)]
            texts = [text.lower() for text in texts] if own.lower else texts
            batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=longest))
            if isinstance(samples[0], str):
                return batch
            return {name: tensor.reshape(-1, 2, tensor.shape[-1]) for name, tensor in batch.items()}

        return collate

    def logits(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """The embeddings (texts, width), of length 1."""
        return torch.nn.functional.normalize(self.embeddings(features), dim=-1)

    def embeddings(self, features: Tensor) -> Tensor:
        """The embeddings (texts, width) as the layers behind the pooling make them."""
        for number, layer in enumerate(self.sentences.layers):
            if layer.kind == DENSE:
                weights, activation = self._dense[number]
                own = {name: tensor.to(features.device) for name, tensor in weights.items()}
                features = activation(
                    torch.nn.functional.linear(features, own["linear.weight"], own.get("linear.bias"))
                )
            else:
                features = torch.nn.functional.normalize(features, dim=-1)
        return features

    def predict(self, features: Features, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Returns the function that predicts the similarities of pairs (samples,), and the embeddings of single texts
        (samples, width)."""

        def predict(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            found = self.embeddings(features(model, batch))
            if not is_finite(found):
                raise ModelError(
                    f"the embeddings on task {task.name} contain NaN or infinity; check the model's weights"
                )
            if next(iter(batch.values())).ndim == 2:
                return found
            return self.similarities(found[::2], found[1::2]).diagonal()

        return predict

    def similarities(self, one: Tensor, other: Tensor) -> Tensor:
        """The similarities (rows, others) of embeddings (rows, width) and (others, width) by the model's function."""
        kind = self.sentences.similarity
        if kind == "cosine":
            return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T
        return one @ other.T if kind == "dot" else -torch.cdist(one, other, 2 if kind == "euclidean" else 1)

    @cached_property
    def _dense(self) -> Mapping[int, tuple[dict[str, Tensor], Any]]:
        """The tensors and the activation of each Dense layer, by its number."""
        from safetensors.torch import load_file

        found = {}
        for number, layer in enumerate(self.sentences.layers):
            if layer.kind == DENSE:
                path = self.sentences.folder / layer.path / WEIGHTS
                weights = {name: tensor.float() for name, tensor in load_file(path).items()}
                found[number] = (weights, _activation(layer.settings, self.sentences))
        return found


def _activation(settings: Mapping[str, Any], sentences: SentenceFolder) -> Any:
    """The activation of a Dense layer, which its settings name with its module; ModelError if torch lacks it."""
    name = str(settings.get("activation_function") or IDENTITY).rpartition(".")[2]
    kind = getattr(torch.nn.modules.activation, name, torch.nn.Identity if name == IDENTITY else None)
    try:
        return kind()  # type: ignore[misc]
    except TypeError as error:
        raise ModelError(
            f"{sentences.role}: {sentences.folder} has a Dense layer with the activation {literal(name)}, which is not "
            "one of torch without settings"
        ) from error
