"""SigLIP (https://arxiv.org/abs/2303.15343), and SigLIP 2 of a fixed resolution, which is built alike: the vision tower
is merged and quantized.

Base: a `SiglipModel`. Experts: `SiglipVisionModel` or `SiglipModel`. The patch convolution, the positions, the probe
and the attention that pools stay as merged; the text tower stays the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.errors import ModelError
from epmq_cli.families.clip import LAYERS, PREFIX, STEPS, Clip
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Norm, Section, Stack
from epmq_cli.families.tasks.zero_shot import PaddedZeroShot
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder

if TYPE_CHECKING:
    from torch import nn

TOWER = PREFIX.rstrip(".")
READOUT = (
    Norm("post_layernorm", mixing=True),
    Norm("head.layernorm"),
    Linears(("head.mlp.fc1",), producer="head.layernorm"),
    Linears(("head.mlp.fc2",), stream="head.layernorm"),
)


@dataclass(frozen=True, kw_only=True)
class Siglip(Clip):
    """`family: siglip`."""

    name: str = "siglip"
    model_types: tuple[str, ...] = ("siglip", "siglip_vision_model")
    unsolved: tuple[str, ...] = (
        r"text_model\..*",
        r"logit_(scale|bias)",
        r".*\.position_ids",
        r"vision_model\.embeddings\..*",
        r"vision_model\.head\.(probe|attention\..*)",
    )

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings of the vision tower; ModelError if it does not pool by attention."""
        own = config_of(folder.path) if (folder.path / "config.json").is_file() else None
        vision = getattr(own, "vision_config", own)
        if not getattr(vision, "vision_use_head", True):
            raise ModelError(
                f"{folder.role}: {folder.path} has no pooling head (vision_use_head: false), which family {self.name} "
                "reads; give a model with it"
            )
        return super().settings(folder)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A SiglipModel."""
        from transformers import SiglipModel

        model: nn.Module = from_folder(SiglipModel, folder, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The layers of the vision encoder, then the last norm and the pooling by attention."""
        from epmq_cli.families.readouts import AttentionPooling  # a module: imports torch

        layers = model.get_submodule(LAYERS)
        blocks = [Section(f"{LAYERS}.{index}", layer, STEPS) for index, layer in layers.named_children()]
        return [Stack(blocks, Section(TOWER, AttentionPooling(model.get_submodule(TOWER)), READOUT))]


SIGLIP = Family(Siglip(), PaddedZeroShot())
