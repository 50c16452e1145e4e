"""RoBERTa classifiers (https://arxiv.org/abs/1907.11692) and the models built like it: XLM-RoBERTa, CamemBERT.

Base: any checkpoint of the encoder. Experts: `RobertaForSequenceClassification` and its like, whose dense layer and
out_proj are the task's head.
"""

from __future__ import annotations

from epmq_cli.families.bert import STEPS
from epmq_cli.families.classifier import TextClassifier
from epmq_cli.families.structure import Table


class Roberta(TextClassifier):
    """`family: roberta`."""

    model_types = ("roberta", "xlm-roberta", "camembert")
    prefix = "roberta."
    parts = ("embeddings.", "encoder.")
    layers = "encoder.layer"
    steps = STEPS
    stem = tuple(Table(f"embeddings.{kind}_embeddings") for kind in ("word", "position", "token_type"))
    first_norm = "embeddings.LayerNorm"
    kept = (r"embeddings\.(position|token_type)_ids",)
    dense, linear = "classifier.dense", "classifier.out_proj"
    reserved = 2  # positions start behind that of the padding
    options = {"add_pooling_layer": False}  # noqa: RUF012 - never changed
