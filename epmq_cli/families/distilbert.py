"""DistilBERT classifiers (https://arxiv.org/abs/1910.01108).

Base: any checkpoint of the encoder. Experts: `DistilBertForSequenceClassification`, whose pre_classifier and classifier
are the task's head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.families.tasks.classifier import TextClassifier

if TYPE_CHECKING:
    from torch import Tensor


Q, K, V = (f"attention.{part}_lin" for part in "qkv")


def relu(hidden: Tensor) -> Tensor:
    return torch.relu(hidden)


DISTILBERT = Family(
    Encoder(
        name="distilbert",
        model_types=("distilbert",),
        prefix="distilbert.",
        parts=("embeddings.", "transformer."),
        layers="transformer.layer",
        steps=(
            Linears((Q, K, V), mixing=(K, V)),
            Linears(("attention.out_lin",), stream=Q, producer=V),
            Norm("sa_layer_norm"),
            Linears(("ffn.lin1",)),
            Linears(("ffn.lin2",), stream="ffn.lin1"),
            Norm("output_layer_norm"),
        ),
        stem=(Table("embeddings.word_embeddings"), Table("embeddings.position_embeddings")),
        first_norm="embeddings.LayerNorm",
        unsolved=(r"embeddings\.position_ids",),
        shared=("n_heads", "activation"),
    ),
    TextClassifier(ClassifierHead(dense="pre_classifier", activation=relu)),
)
