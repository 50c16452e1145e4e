"""RoBERTa classifiers (https://arxiv.org/abs/1907.11692), and XLM-RoBERTa and CamemBERT, which are built alike.

Base: any checkpoint of the encoder. Experts: `RobertaForSequenceClassification` and the like, whose dense layer and
out_proj are the task's head.
"""

from __future__ import annotations

from epmq_cli.families.bert import STEPS, TABLES
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.tasks.classifier import TextClassifier

ROBERTA = Family(
    Encoder(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        prefix="roberta.",
        parts=("embeddings.", "encoder."),
        layers="encoder.layer",
        steps=STEPS,
        stem=TABLES,
        first_norm="embeddings.LayerNorm",
        unsolved=(r"embeddings\.(position|token_type)_ids",),
        reserved=2,  # positions start after the padding id
        options={"add_pooling_layer": False},
    ),
    TextClassifier(ClassifierHead(dense="classifier.dense", linear="classifier.out_proj")),
)
