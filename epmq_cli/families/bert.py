"""BERT classifiers (https://arxiv.org/abs/1810.04805) as transformers has them: encoder, embeddings and pooler are
merged.

Base: any BERT checkpoint with a pooler. Experts: `BertForSequenceClassification`, whose classifier is the task's
head. The linears of the blocks are quantized; the pooler stays dense. `epmq merge` also takes models without a pooler.
"""

from __future__ import annotations

from torch import Tensor, nn

from epmq_cli.data.batching import Batch
from epmq_cli.families.classifier import TextClassifier
from epmq_cli.families.structure import Linears, Norm, Section, Table

STEPS = (
    Linears(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        mixing=("attention.self.key", "attention.self.value"),
    ),
    Linears(("attention.output.dense",), stream="attention.self.query", producer="attention.self.value"),
    Norm("attention.output.LayerNorm"),
    Linears(("intermediate.dense",)),
    Linears(("output.dense",), stream="intermediate.dense"),
    Norm("output.LayerNorm"),
)


class Bert(TextClassifier):
    """`family: bert`."""

    model_types = ("bert",)
    prefix = "bert."
    parts = ("embeddings.", "encoder.", "pooler.")
    added = ("pooler.",)
    layers = "encoder.layer"
    steps = STEPS
    stem = tuple(Table(f"embeddings.{kind}_embeddings") for kind in ("word", "position", "token_type"))
    first_norm = "embeddings.LayerNorm"
    kept = (r"embeddings\.(position|token_type)_ids",)

    def readout(self, model: nn.Module) -> Section:
        """The pooler, which reads the first token."""
        return Section("pooler", model.get_submodule("pooler"), (Linears(("dense",)),))

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The pooler's output: (samples, hidden size)."""
        features: Tensor = model(**batch).pooler_output
        return features
