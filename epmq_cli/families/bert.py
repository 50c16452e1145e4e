"""BERT classifiers (https://arxiv.org/abs/1810.04805) in the form that transformers has.

Base: any BERT checkpoint with a pooler. Experts: `BertForSequenceClassification`, whose classifier is the task's head.
Encoder, embeddings and pooler are merged; the pooler stays dense. `epmq merge` also takes models without a pooler.
"""

from __future__ import annotations

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.families.tasks.classifier import TextClassifier

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
TABLES = tuple(Table(f"embeddings.{kind}_embeddings") for kind in ("word", "position", "token_type"))

BERT = Family(
    Encoder(
        name="bert",
        model_types=("bert",),
        prefix="bert.",
        parts=("embeddings.", "encoder.", "pooler."),
        added=("pooler.",),
        layers="encoder.layer",
        steps=STEPS,
        stem=TABLES,
        first_norm="embeddings.LayerNorm",
        pooler="pooler",
        unsolved=(r"embeddings\.(position|token_type)_ids",),
    ),
    TextClassifier(ClassifierHead()),
)
