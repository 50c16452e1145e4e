"""Vision transformers with a classifier (https://arxiv.org/abs/2010.11929) as transformers has them.

Base: any checkpoint of the encoder. Experts: `ViTForImageClassification`, whose classifier is the task's head. The
patches' convolution, their positions and the class token stay as merged.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL.Image import Image
from torch import nn

from epmq_cli.data.batching import Collate
from epmq_cli.data.suite import Task
from epmq_cli.families.classifier import Classifier
from epmq_cli.families.parts import LastNorm
from epmq_cli.families.processors import images
from epmq_cli.families.structure import Linears, Norm, Section
from epmq_cli.models.processor_folder import Processor

Q, K, V = (f"attention.{part}_proj" for part in "qkv")
OLD = (
    (r"(?<![^.])encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"(?<![^.])encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
    (r"(?<![^.])encoder\.layer\.", "layers."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
)
"""The names that files written before transformers 5 have, and today's."""


class Vit(Classifier):
    """`family: vit`."""

    sample_types = (Image,)
    model_types = ("vit",)
    reads = "pictures"
    options = {"add_pooling_layer": False}  # noqa: RUF012 - never changed
    prefix = "vit."
    parts = ("embeddings.", "layers.", "layernorm.")
    kept = (
        r"embeddings\.(cls_token|mask_token|position_embeddings)",
        r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
    )
    layers = "layers"
    steps = (
        Norm("layernorm_before", mixing=True),
        Linears((Q, K, V), mixing=(K, V), producer="layernorm_before"),
        Linears(("attention.o_proj",), stream="layernorm_before", producer=V),
        Norm("layernorm_after"),
        Linears(("mlp.fc1",), producer="layernorm_after"),
        Linears(("mlp.fc2",), stream="layernorm_after"),
    )

    def spelling(self, stored: str) -> str:
        """The model's own name of a stored tensor."""
        stored = stored.removeprefix(self.prefix)
        for old, new in OLD:
            stored = re.sub(old, new, stored)
        return stored

    def readout(self, model: nn.Module) -> Section:
        """The last layer norm, whose first token is read."""
        return LastNorm.section(model, "layernorm", token=0)

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pictures through the image processor, as RGB."""
        return images(folder, processor)
