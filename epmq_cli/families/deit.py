"""DeiT classifiers (https://arxiv.org/abs/2012.12877): ViT's blocks with a second token for distillation.

Base: any checkpoint of the encoder. Experts: `DeiTForImageClassification`, whose classifier of the class token is the
task's head. The patch convolution, the positions and both tokens stay as merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.tasks.classifier import ImageClassifier
from epmq_cli.families.vit import VIT

ENCODER = cast(Encoder, VIT.architecture)

DEIT = Family(
    replace(
        ENCODER,
        name="deit",
        model_types=("deit",),
        prefix="deit.",
        unsolved=(*ENCODER.unsolved, r"embeddings\.distillation_token"),
    ),
    ImageClassifier(ClassifierHead()),
)
