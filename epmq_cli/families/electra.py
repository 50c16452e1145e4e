"""ELECTRA classifiers (https://arxiv.org/abs/2003.10555): BERT's blocks without a pooler.

Base: any checkpoint of the discriminator. Experts: `ElectraForSequenceClassification`, whose dense layer and out_proj
are the task's head. The projection of small models from the embeddings to the blocks stays as merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epmq_cli.families.bert import STEPS, TABLES
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.tasks.classifier import TextClassifier

if TYPE_CHECKING:
    from torch import Tensor


def gelu(hidden: Tensor) -> Tensor:
    """GELU of each element, which the head has for any activation of the blocks."""
    return torch.nn.functional.gelu(hidden)


ELECTRA = Family(
    Encoder(
        name="electra",
        model_types=("electra",),
        prefix="electra.",
        parts=("embeddings.", "embeddings_project.", "encoder."),
        layers="encoder.layer",
        steps=STEPS,
        stem=TABLES,
        first_norm="embeddings.LayerNorm",
        unsolved=(r"embeddings\.(position|token_type)_ids", r"embeddings_project\.(weight|bias)"),
    ),
    TextClassifier(ClassifierHead(dense="classifier.dense", activation=gelu, linear="classifier.out_proj")),
)
