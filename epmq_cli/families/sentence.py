"""Models of sentence-transformers: any text encoder of the other families, with the pooling of their folder.

Base: such a folder, or any checkpoint of the encoder. Experts: such folders. The pooler of BERT, which they do not
read, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ModelError
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.structure import ReadToken, pooled, token_mask
from epmq_cli.families.tasks.embedding import Embedding
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.sentence_folder import (
    SentenceFolder,
    differences,
    is_sentence_folder,
    read_sentence_folder,
    transformer_folder,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "sentence_transformers"
POOLER = "pooler."


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder(Encoder):
    """An encoder in folders like `sentences`."""

    sentences: SentenceFolder

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """Opens the transformer in a folder. ModelError if the folder embeds in another way than `sentences`."""
        if is_sentence_folder(path):
            own = read_sentence_folder(path, role)
            if (problem := next(differences(own, self.sentences), None)) is not None:
                raise ModelError(f"{role}: {path} {problem}; give models that differ in their transformers only")
        return super().open(transformer_folder(path, role), role, base)

    def read_token(self, model: nn.Module) -> ReadToken:
        """The pooling."""
        pooling: Any = self.sentences.pooling
        return 0 if pooling == "cls" else pooling

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The pooled output (texts, width). Of batches of pairs, (samples, 2, tokens), both texts one after the
        other."""
        single = {name: tensor.flatten(0, -2) for name, tensor in batch.items()}
        return pooled(model(**single).last_hidden_state, self.read_token(model), token_mask(single))

    def further_files(self, path: Path) -> Mapping[str, Path]:
        """The settings of the pooling and the layers behind it."""
        return self.sentences.files

    def save_beside(self, checkpoint: Path) -> None:
        """Makes the checkpoint a folder of sentence-transformers."""
        self.sentences.save(checkpoint)


def sentence_family(sentences: SentenceFolder, family: Family) -> Family:
    """The family of models in folders like `sentences`, whose transformers are those of a family."""
    own = family.architecture
    if not isinstance(own, Encoder) or family.reads != "texts":
        raise ModelError(
            f"{sentences.role}: {sentences.folder} is a sentence-transformers model with a transformer of family "
            f"{family.name}; epmq takes text encoders, such as those of families bert, roberta, mpnet and modernbert"
        )
    given: dict[str, Any] = {field.name: getattr(own, field.name) for field in fields(own)}
    if own.pooler is not None:
        given |= {"parts": tuple(part for part in own.parts if part != POOLER), "added": (), "pooler": None}
        given |= {"options": {"add_pooling_layer": False}}
    # sentence-transformers reads the linears before it calls the whole model
    given |= {"name": NAME, "dequantize_on_load": True, "mixes_formats": False}
    return Family(SentenceEncoder(**given, sentences=sentences), Embedding(sentences))
