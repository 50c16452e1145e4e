"""DeBERTa classifiers, version 2 and 3 (https://arxiv.org/abs/2111.09543).

Base: any checkpoint of the encoder. Experts: `DebertaV2ForSequenceClassification`, whose pooler and classifier are the
task's head. Where position and content share their keys and queries (`share_att_key`), these linears also read the
table of relative positions: they are calibrated on what they read of the text alone, and that table stays as merged.
"""

from __future__ import annotations

from typing import Any

from torch.nn.functional import gelu

from epmq_cli.errors import ModelError
from epmq_cli.families.classifier import TextClassifier
from epmq_cli.families.parts import block_settings
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.models.model_folder import ModelFolder

QUERY, KEY, VALUE = (f"attention.self.{part}_proj" for part in ("query", "key", "value"))


class Deberta(TextClassifier):
    """`family: deberta`."""

    model_types = ("deberta-v2",)
    prefix = "deberta."
    parts = ("embeddings.", "encoder.")
    layers = "encoder.layer"
    steps = (
        Linears((QUERY, KEY, VALUE), mixing=(KEY, VALUE)),
        Linears(("attention.output.dense",), stream=QUERY, producer=VALUE),
        Norm("attention.output.LayerNorm"),
        Linears(("intermediate.dense",)),
        Linears(("output.dense",), stream="intermediate.dense"),
        Norm("output.LayerNorm"),
    )
    stem = (Table("embeddings.word_embeddings"),)
    first_norm = "embeddings.LayerNorm"
    kept = (
        r"embeddings\.(position_ids|(position|token_type)_embeddings\.weight|embed_proj\.weight)",
        r"encoder\.(rel_embeddings\.weight|LayerNorm\.(weight|bias))",
        r"encoder\.layer\.\d+\.attention\.self\.pos_(key|query)_proj\.(weight|bias)",
    )
    repeated = (QUERY, KEY)  # for the relative positions too
    dense = "pooler.dense"
    activation = staticmethod(gelu)

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the encoder; ModelError where it is built otherwise than the blocks that are walked."""
        for name, usual in (("conv_kernel_size", 0), ("pooler_hidden_act", "gelu")):
            found = folder.config.get(name, usual)
            if found != usual:
                raise ModelError(f"{folder.role}: {folder.path} has {name} {found}, family deberta takes {usual} only")
        shared = ("relative_attention", "pos_att_type", "position_buckets", "share_att_key", "norm_rel_ebd")
        return block_settings(folder) | {name: folder.config.get(name) for name in shared}
