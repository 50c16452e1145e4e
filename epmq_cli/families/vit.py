"""Vision transformers with a classifier (https://arxiv.org/abs/2010.11929), in the form that transformers has.

Base: any checkpoint of the encoder. Experts: `ViTForImageClassification`, whose classifier is the task's head. The
patch convolution, the positions and the class token stay as merged.
"""

from __future__ import annotations

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.structure import Linears, Norm
from epmq_cli.families.tasks.classifier import ImageClassifier

Q, K, V = (f"attention.{part}_proj" for part in "qkv")
OLD_NAMES = (
    (r"(?<![^.])encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"(?<![^.])encoder\.layer\.", "layers."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
)
"""Patterns of the names in files from before transformers 5, and today's names."""


def block_steps(first: str, second: str) -> tuple[Linears | Norm, ...]:
    """The steps of a block with these norms."""
    return (
        Norm(first, mixing=True),
        Linears((Q, K, V), mixing=(K, V), producer=first),
        Linears(("attention.o_proj",), stream=first, producer=V),
        Norm(second),
        Linears(("mlp.fc1",), producer=second),
        Linears(("mlp.fc2",), stream=second),
    )


VIT = Family(
    Encoder(
        name="vit",
        model_types=("vit",),
        prefix="vit.",
        parts=("embeddings.", "layers.", "layernorm."),
        layers="layers",
        steps=block_steps("layernorm_before", "layernorm_after"),
        last_norm="layernorm",
        unsolved=(
            r"embeddings\.(cls_token|mask_token|position_embeddings)",
            r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        ),
        old_names=OLD_NAMES,
        options={"add_pooling_layer": False},
    ),
    ImageClassifier(ClassifierHead()),
)
