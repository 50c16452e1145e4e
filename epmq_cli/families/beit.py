"""BEiT classifiers (https://arxiv.org/abs/2106.08254): ViT's blocks with layer scales and biases of positions.

Base: any checkpoint of the encoder. Experts: `BeitForImageClassification`, whose classifier reads the normed mean of
the patches, or the class token. The layer scales are folded into the linears in front of them. Keys have no bias, so
queries, keys and values are solved one by one. The patch convolution, positions, their biases and the class token stay
as merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm, ReadToken, Section
from epmq_cli.families.tasks.classifier import ImageClassifier
from epmq_cli.families.vit import OLD_NAMES, K, Q, V, block_steps

if TYPE_CHECKING:
    from torch import nn

FIRST, _, *OTHERS = block_steps("layernorm_before", "layernorm_after")
TABLE = r"relative_position_bias_table"


@dataclass(frozen=True, kw_only=True)
class Beit(Encoder):
    """`family: beit`."""

    @property
    def reads_pooler(self) -> bool:
        return True

    def read_token(self, model: nn.Module) -> ReadToken:
        """The class token, or all."""
        config: Any = model.config
        return None if config.use_mean_pooling else 0

    def _readout(self, model: nn.Module, token: ReadToken) -> Section:
        if token == 0:
            return super()._readout(model, token)
        from epmq_cli.families.readouts import NormedMean  # a module: imports torch

        readout = NormedMean(model.get_submodule("pooler.layernorm"), "layernorm", 1)
        return Section("pooler", readout, (Norm("layernorm"),))


BEIT = Family(
    Beit(
        name="beit",
        model_types=("beit",),
        prefix="beit.",
        parts=("embeddings.", "layers.", "layernorm.", "pooler.", "shared_position_bias."),
        layers="layers",
        steps=(FIRST, Linears((Q,)), Linears((K,), mixing=(K,)), Linears((V,), mixing=(V,)), *OTHERS),
        last_norm="layernorm",
        factors=(
            (r"(layers\.\d+)\.lambda_1", r"\1.attention.o_proj"),
            (r"(layers\.\d+)\.lambda_2", r"\1.mlp.fc2"),
        ),
        unsolved=(
            r"embeddings\.(cls_token|mask_token|position_embeddings)",
            r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
            rf"(layers\.\d+\.relative_position_bias|shared_position_bias)\.{TABLE}",
            r"layers\.\d+\.lambda_[12]",
        ),
        shared=(
            *("num_attention_heads", "hidden_act", "layer_norm_eps", "use_mean_pooling", "use_relative_position_bias"),
            "use_shared_relative_position_bias",
        ),
        old_names=(
            (rf"attention\.attention\.relative_position_bias\.{TABLE}", f"relative_position_bias.{TABLE}"),
            (r"(?<![^.])encoder\.relative_position_bias\.", "shared_position_bias."),
            *OLD_NAMES,
        ),
    ),
    ImageClassifier(ClassifierHead()),
)
