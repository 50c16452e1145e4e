"""DistilBERT classifiers (https://arxiv.org/abs/1910.01108).

Base: any checkpoint of the encoder. Experts: `DistilBertForSequenceClassification`, whose pre_classifier and classifier
are the task's head.
"""

from __future__ import annotations

from typing import Any

from torch import relu

from epmq_cli.families.classifier import TextClassifier
from epmq_cli.families.parts import block_settings
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.models.model_folder import ModelFolder

Q, K, V = (f"attention.{part}_lin" for part in "qkv")


class DistilBert(TextClassifier):
    """`family: distilbert`."""

    model_types = ("distilbert",)
    prefix = "distilbert."
    parts = ("embeddings.", "transformer.")
    layers = "transformer.layer"
    steps = (
        Linears((Q, K, V), mixing=(K, V)),
        Linears(("attention.out_lin",), stream=Q, producer=V),
        Norm("sa_layer_norm"),
        Linears(("ffn.lin1",)),
        Linears(("ffn.lin2",), stream="ffn.lin1"),
        Norm("output_layer_norm"),
    )
    stem = tuple(Table(f"embeddings.{kind}_embeddings") for kind in ("word", "position"))
    first_norm = "embeddings.LayerNorm"
    kept = (r"embeddings\.position_ids",)
    dense = "pre_classifier"
    activation = staticmethod(relu)

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the encoder."""
        return block_settings(folder, names=("n_heads", "activation"))
