"""ModernBERT classifiers (https://arxiv.org/abs/2412.13663).

Base: any checkpoint of the encoder. Experts: `ModernBertForSequenceClassification`, whose dense layer, norm and
classifier are the task's head. Heads read the first token or the mean of all tokens (`classifier_pooling`). The first
block has an Identity in place of the norm before attention, which has no gain to solve.
"""

from __future__ import annotations

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.families.tasks.classifier import TextClassifier

MODERNBERT = Family(
    Encoder(
        name="modernbert",
        model_types=("modernbert",),
        dequantize_on_load=True,
        mixes_formats=False,  # while it loads, transformers initializes blocks through the weights of their linears
        prefix="model.",
        parts=("embeddings.", "layers.", "final_norm."),
        layers="layers",
        steps=(
            Norm("attn_norm", mixing=True),
            Linears(("attn.Wqkv",), mixing=("attn.Wqkv",)),
            Linears(("attn.Wo",), stream="attn_norm"),
            Norm("mlp_norm"),
            Linears(("mlp.Wi",)),
            Linears(("mlp.Wo",), stream="mlp_norm"),
        ),
        stem=(Table("embeddings.tok_embeddings"),),
        first_norm="embeddings.norm",
        last_norm="final_norm",
        pooling="classifier_pooling",
        shared=(
            *("num_attention_heads", "hidden_activation", "norm_eps", "layer_types", "local_attention"),
            *("rope_parameters", "classifier_pooling", "classifier_activation"),
        ),
    ),
    TextClassifier(ClassifierHead(dense="head.dense", activation="classifier_activation", norm="head.norm")),
)
