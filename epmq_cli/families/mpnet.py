"""MPNet classifiers (https://arxiv.org/abs/2004.09297).

Base: any checkpoint of the encoder. Experts: `MPNetForSequenceClassification`, whose dense layer and out_proj are the
task's head. The table of relative positions, which all blocks share, stays as merged.
"""

from __future__ import annotations

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.families.tasks.classifier import TextClassifier

Q, K, V = (f"attention.attn.{part}" for part in "qkv")

MPNET = Family(
    Encoder(
        name="mpnet",
        model_types=("mpnet",),
        prefix="mpnet.",
        parts=("embeddings.", "encoder."),
        layers="encoder.layer",
        steps=(
            Linears((Q, K, V), mixing=(K, V)),
            Linears(("attention.attn.o",), stream=Q, producer=V),
            Norm("attention.LayerNorm"),
            Linears(("intermediate.dense",)),
            Linears(("output.dense",), stream="intermediate.dense"),
            Norm("output.LayerNorm"),
        ),
        stem=(Table("embeddings.word_embeddings"), Table("embeddings.position_embeddings")),
        first_norm="embeddings.LayerNorm",
        unsolved=(r"embeddings\.position_ids", r"encoder\.relative_attention_bias\.weight"),
        shared=("num_attention_heads", "hidden_act", "layer_norm_eps", "relative_attention_num_buckets"),
        reserved=2,  # positions start after the padding id
        options={"add_pooling_layer": False},
    ),
    TextClassifier(ClassifierHead(dense="classifier.dense", linear="classifier.out_proj")),
)
