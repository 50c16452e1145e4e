"""Swin classifiers (https://arxiv.org/abs/2103.14030): stages of blocks that attend within windows, and between stages
a norm and a linear that merge patches.

Base: any checkpoint of the encoder. Experts: `SwinForImageClassification`, whose classifier reads the mean of the
normed patches. Each stage is a stack, whose readout merges patches for the next: it is calibrated and stays dense. The
patch convolution, the positions and their biases stay as merged. Windows must fill the picture of each stage, as they
do in published models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.errors import ModelError
from epmq_cli.families.beit import TABLE
from epmq_cli.families.encoder import Encoder
from epmq_cli.families.family import Family
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.parts import block_settings
from epmq_cli.families.structure import MEAN, Linears, Norm, Section, Stack
from epmq_cli.families.tasks.classifier import ImageClassifier
from epmq_cli.families.vit import OLD_NAMES, block_steps
from epmq_cli.models.model_folder import ModelFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.models.rotation import ValueHeads

STAGE = "stage_{}"
"""The key under which a stage finds its input in a batch."""
SIZES = ("image_size", "patch_size", "window_size", "depths")


@dataclass(frozen=True, kw_only=True)
class Swin(Encoder):
    """`family: swin`."""

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """See Encoder; ModelError if windows do not fill the picture of a stage."""
        sizes = block_settings(folder, names=SIZES)
        picture, patch, window = (sizes[name] for name in SIZES[:3])
        sides = picture if isinstance(picture, list | tuple) else (picture, picture)
        side = sides[0] // patch if isinstance(patch, int) and len({*sides}) == 1 else 0
        for stage in range(1, len(sizes["depths"]) + 1):
            if side == 0 or side % window:
                raise ModelError(
                    f"{folder.role}: {folder.path} has pictures of {picture} and patches of {patch} pixels, family "
                    f"{self.name} takes squares, and in each stage windows that fill the picture: those of stage "
                    f"{stage} have {window} x {window} patches"
                )
            side = math.ceil(side / 2)
        return super().settings(folder)

    def value_heads(self, folder: ModelFolder) -> ValueHeads | None:
        """None: stages have different numbers of heads."""
        return None

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The encoder alone. Its blocks see all tokens window by window."""
        from epmq_cli.models.windows import in_windows  # a module: imports torch

        loaded: Any = super().load(folder, **options)
        in_windows(loaded[0] if isinstance(loaded, tuple) else loaded)
        model: nn.Module = loaded
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The stages. The readout of the last is the norm in front of the mean."""
        from epmq_cli.families.readouts import LastNorm, PatchMerging  # modules: import torch

        stacks = list[Stack]()
        for index, stage in model.get_submodule(self.layers).named_children():
            path, merging = f"{self.layers}.{index}", getattr(stage, "downsample", None)
            layers = stage.get_submodule("blocks").named_children()
            blocks = [Section(f"{path}.blocks.{each}", layer, self.steps) for each, layer in layers]
            first = None if stacks else self.first_norm
            if merging is None:
                stacks.append(Stack(blocks, LastNorm.section(model, str(self.last_norm)), (), first, MEAN))
            else:
                steps = (Norm("norm"), Linears(("reduction",)))
                readout = Section(f"{path}.downsample", PatchMerging(merging), steps)
                stacks.append(Stack(blocks, readout, (), first, handed=STAGE.format(len(stacks) + 1)))
        return stacks

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The normed mean of the patches: (samples, width). Begins with the last stage whose input is in the batch."""
        encoder: Any = model
        stages = list(encoder.encoder.layers)
        begun = next((number for number in reversed(range(len(stages))) if STAGE.format(number) in batch), None)
        if begun is None:
            features: Tensor = encoder(batch["pixel_values"]).pooler_output
            return features
        hidden = batch[STAGE.format(begun)]
        for stage in stages[begun:]:
            side = math.isqrt(hidden.shape[1])
            hidden = stage(hidden, (side, side))[0]
        normed: Tensor = encoder.layernorm(hidden)
        pooled: Tensor = encoder.pooler(normed.transpose(1, 2)).flatten(1)
        return pooled


SWIN = Family(
    Swin(
        name="swin",
        model_types=("swin",),
        prefix="swin.",
        parts=("embeddings.", "encoder.", "layernorm."),
        layers="encoder.layers",
        steps=block_steps("layernorm_before", "layernorm_after"),
        first_norm="embeddings.norm",
        last_norm="layernorm",
        unsolved=(
            r"embeddings\.(mask_token|position_embeddings)",
            r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
            rf"[\w.]+\.attention\.relative_position_bias\.{TABLE}",
        ),
        shared=("num_heads", "hidden_act", "layer_norm_eps", *SIZES),
        old_names=(
            (rf"\.attention\.self\.{TABLE}$", rf".attention.relative_position_bias.{TABLE}"),
            (r"\.attention\.self\.(query|key|value)\.", r".attention.\1."),
            *OLD_NAMES[-3:],
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
        ),
    ),
    ImageClassifier(ClassifierHead()),
)
