"""DINOv2 classifiers (https://arxiv.org/abs/2304.07193), without and with registers (https://arxiv.org/abs/2309.16588).

Base: any checkpoint of the encoder. Experts: `Dinov2ForImageClassification` and the like, whose classifier reads the
class token beside the mean of the patches. The layer scales are folded into the linears in front of them. The patch
convolution, the positions, the class token and registers stay as merged.
"""

from __future__ import annotations

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import FirstAndMean
from epmq_cli.families.tasks.classifier import ImageClassifier
from epmq_cli.families.vit import OLD_NAMES, block_steps

SCALE = r"(encoder\.layer\.\d+)\.layer_scale"

DINOV2 = Family(
    Encoder(
        name="dinov2",
        model_types=("dinov2", "dinov2_with_registers"),
        prefix="dinov2.",
        parts=("embeddings.", "encoder.", "layernorm."),
        layers="encoder.layer",
        steps=block_steps("norm1", "norm2"),
        last_norm="layernorm",
        reads=FirstAndMean(1),
        factors=((f"{SCALE}1\\.lambda1", r"\1.attention.o_proj"), (f"{SCALE}2\\.lambda1", r"\1.mlp.fc2")),
        unsolved=(
            r"embeddings\.(cls_token|mask_token|position_embeddings|register_tokens)",
            r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
            f"{SCALE}[12]\\.lambda1",
        ),
        shared=("num_attention_heads", "hidden_act", "layer_norm_eps", "num_register_tokens"),
        fixed={"use_swiglu_ffn": False},
        old_names=(
            (r"^dinov2_with_registers\.", ""),
            (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            *OLD_NAMES[-3:],
        ),
    ),
    ImageClassifier(ClassifierHead(), head_widths=2),
)
