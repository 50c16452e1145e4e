"""CLIP (https://arxiv.org/abs/2103.00020) in the form that transformers has: the vision tower is merged and quantized.

Base: a `CLIPModel`. Experts: `CLIPVisionModel` or `CLIPModel`; the visual projection is merged too where one of them
has trained it. The text tower stays the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.data.suite import Task
from epmq_cli.families.architecture import Architecture, Experts
from epmq_cli.families.family import Family
from epmq_cli.families.parts import block_settings, value_heads
from epmq_cli.families.structure import Linears, Norm, Patches, Section, Stack
from epmq_cli.families.tasks.zero_shot import ZeroShot
from epmq_cli.families.text_tower import PARTS, PROJECTION, drifts, tell
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.models.rotation import ValueHeads

PREFIX = "vision_model."
LAYERS = PREFIX + "encoder.layers"
STEPS = (
    Norm("layer_norm1", mixing=True),
    Linears(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        mixing=("self_attn.k_proj", "self_attn.v_proj"),
        producer="layer_norm1",
    ),
    Linears(("self_attn.out_proj",), stream="layer_norm1", producer="self_attn.v_proj"),
    Norm("layer_norm2"),
    Linears(("mlp.fc1",), producer="layer_norm2"),
    Linears(("mlp.fc2",), stream="layer_norm2"),
)
STEM = (
    Patches(
        convolution=PREFIX + "embeddings.patch_embedding",
        positions=PREFIX + "embeddings.position_embedding",
        class_token=PREFIX + "embeddings.class_embedding",
    ),
)
READOUT = (Norm(PREFIX + "post_layernorm"), Linears(("visual_projection",)))


@dataclass(frozen=True, kw_only=True)
class Clip(Architecture):
    """`family: clip`."""

    name: str = "clip"
    model_types: tuple[str, ...] = ("clip", "clip_vision_model")
    unsolved: tuple[str, ...] = (
        r"text_model\..*",
        r"text_projection\.weight",
        "logit_scale",
        r".*\.position_ids",
    )
    dequantize_on_load: bool = True  # get_image_features bypasses the forward method of the model

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The vision tower, with the prefix of a CLIPModel or without, as transformers 5 stores a CLIPVisionModel."""
        self.check_type(folder)
        names = self.all_names(folder)
        tower = {name: stored for name, stored in names.items() if name.startswith(PREFIX)}
        return {name: stored for name, stored in tower.items() if not name.endswith("position_ids")}

    def all_names(self, folder: ModelFolder) -> dict[str, str]:
        """All stored tensors; those of a bare vision tower get its prefix."""
        prefixed = any(name.startswith(PREFIX) for name in folder.infos)
        beside = {name for name in folder.infos if prefixed or name.partition(".")[0] in PARTS}
        return {name if name in beside else PREFIX + name: name for name in folder.infos}

    def trained_beside(self, base: ModelFolder, experts: Experts, tasks: Sequence[Task]) -> list[str]:
        """The visual projection where an expert has trained it; reports other trained tensors."""
        drift_of = {task.name: drifts(base, experts[task.name]) for task in tasks}
        merged = any("visual_projection" in parts for parts in drift_of.values())
        for task in tasks:
            tell(experts[task.name], task, drift_of[task.name], merged)
        return [PROJECTION] if merged else []

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings of the vision tower."""
        return block_settings(folder, "vision_config")

    def value_heads(self, folder: ModelFolder) -> ValueHeads | None:
        """The values of the vision tower."""
        heads = self.settings(folder)["num_attention_heads"]
        return value_heads(LAYERS, STEPS, self.tensor_names(folder), heads)

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A CLIPModel."""
        from transformers import CLIPModel

        model: nn.Module = from_folder(CLIPModel, folder, **options)
        return model

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The layers of the vision encoder, then the last norm and the projection of the class token."""
        from epmq_cli.families.readouts import ProjectedToken  # a module: imports torch

        layers = model.get_submodule(LAYERS)
        blocks = [Section(f"{LAYERS}.{index}", layer, STEPS) for index, layer in layers.named_children()]
        readout = Section("", ProjectedToken(model, PREFIX), READOUT)
        return [Stack(blocks, readout, STEM, PREFIX + "pre_layrnorm", read_token=0)]

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The projected image embeddings (samples, projection width), not normalized."""
        output = model.get_image_features(**batch)  # type: ignore[operator]
        features: Tensor = output.pooler_output
        return features


CLIP = Family(Clip(), ZeroShot())
