"""DeBERTa classifiers, versions 2 and 3 (https://arxiv.org/abs/2111.09543).

Base: any checkpoint of the encoder. Experts: `DebertaV2ForSequenceClassification`, whose pooler and classifier are the
task's head. With `share_att_key`, the linears of queries and keys also read the table of relative positions: they are
calibrated on their inputs from the text alone, and the table stays as merged.
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


QUERY, KEY, VALUE = (f"attention.self.{part}_proj" for part in ("query", "key", "value"))


def gelu(hidden: Tensor) -> Tensor:
    return torch.nn.functional.gelu(hidden)


DEBERTA = Family(
    Encoder(
        name="deberta",
        model_types=("deberta-v2",),
        prefix="deberta.",
        parts=("embeddings.", "encoder."),
        layers="encoder.layer",
        steps=(
            Linears((QUERY, KEY, VALUE), mixing=(KEY, VALUE)),
            Linears(("attention.output.dense",), stream=QUERY, producer=VALUE),
            Norm("attention.output.LayerNorm"),
            Linears(("intermediate.dense",)),
            Linears(("output.dense",), stream="intermediate.dense"),
            Norm("output.LayerNorm"),
        ),
        stem=(Table("embeddings.word_embeddings"),),
        first_norm="embeddings.LayerNorm",
        unsolved=(
            r"embeddings\.(position_ids|(position|token_type)_embeddings\.weight|embed_proj\.weight)",
            r"encoder\.(rel_embeddings\.weight|LayerNorm\.(weight|bias))",
            r"encoder\.layer\.\d+\.attention\.self\.pos_(key|query)_proj\.(weight|bias)",
        ),
        repeated=(QUERY, KEY),  # on the relative positions too
        shared=(
            *("num_attention_heads", "hidden_act", "layer_norm_eps", "relative_attention", "pos_att_type"),
            *("position_buckets", "share_att_key", "norm_rel_ebd"),
        ),
        fixed={"conv_kernel_size": 0, "pooler_hidden_act": "gelu"},
    ),
    TextClassifier(ClassifierHead(dense="pooler.dense", activation=gelu)),
)
