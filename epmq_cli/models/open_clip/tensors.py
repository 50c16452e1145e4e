"""open_clip's tensors under the names and in the shapes of transformers' CLIPModel.

Source of open_clip's layout: https://github.com/mlfoundations/open_clip, `VisionTransformer` and `TextTransformer`.
The fused `attn.in_proj_weight` is split into the linears q, k and v. The projections are transposed, since open_clip
multiplies with them from the right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import TensorInfo, Tensors

if TYPE_CHECKING:
    from torch import Tensor

ANCHOR = "conv1.weight"  # every vision transformer has it, exactly once
VISUAL = "visual."
CUSTOM_TEXT = "text."
NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
MODULES = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
TOWERS = ("visual.", "transformer.")
"""Prefixes under which an unknown tensor means another architecture; elsewhere it is a head or a buffer."""


@dataclass(frozen=True)
class _Part:
    """The source of a tensor: a stored tensor, or the third of its rows with this index."""

    stored: str
    third: int | None
    transposed: bool


class Translated:
    """The tensors of an open_clip state dict under CLIPModel's names.

    The state dict may hold the whole model, its image encoder or its vision tower, under any prefix that fine-tuning
    code adds. ModelError if the model is not a plain vision transformer.
    """

    def __init__(self, tensors: Tensors, path: Path, role: str) -> None:
        self._tensors = tensors
        self._parts: dict[str, _Part] = {}
        for name, stored in _own_names(tensors, path, role).items():
            targets = _targets(name)
            if not targets and name.startswith(TOWERS):
                raise ModelError(
                    f"{role}: {path} holds {stored}, which transformers' CLIPModel does not have; "
                    "family open_clip needs a plain vision transformer"
                )
            shape = tensors.infos[stored].shape
            if len(targets) > 1 and (not shape or shape[0] % len(targets)):
                raise ModelError(
                    f"{role}: {path} holds {stored} of the shape {list(shape)}, whose rows are not those of "
                    f"{len(targets)} linears of one size; fetch it again"
                )
            for index, target in enumerate(targets):
                third = index if len(targets) > 1 else None
                self._parts[target] = _Part(stored, third, name in TRANSPOSED)
        self.infos = {name: self._info(part) for name, part in self._parts.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor with this name in CLIPModel."""
        part = self._parts[name]
        tensor = self._tensors.tensor(part.stored)
        if part.third is not None:
            tensor = tensor.chunk(3)[part.third]
        return (tensor.T if part.transposed else tensor).contiguous()

    def _info(self, part: _Part) -> TensorInfo:
        info = self._tensors.infos[part.stored]
        shape = info.shape[::-1] if part.transposed else info.shape
        return TensorInfo(shape if part.third is None else (shape[0] // 3, *shape[1:]), info.dtype)


def _own_names(tensors: Tensors, path: Path, role: str) -> dict[str, str]:
    """Maps open_clip's name of each tensor of the model to its name in the file."""
    anchors = [name for name in tensors.infos if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    if len(anchors) != 1 or len(tensors.infos[anchors[0]].shape) != 4:
        raise ModelError(
            f"{role}: {path} has no visual.{ANCHOR}, so it is not a vision transformer of open_clip; "
            "give the state dict of an open_clip model or of its image encoder"
        )
    tower = anchors[0].removesuffix(ANCHOR)
    whole = tower == VISUAL or tower.endswith(f".{VISUAL}")
    prefix = tower.removesuffix(VISUAL) if whole else tower
    names = {}
    for stored in tensors.infos:
        if stored.startswith(prefix):
            name = stored.removeprefix(prefix)
            names[name.removeprefix(CUSTOM_TEXT) if whole else VISUAL + name] = stored
    return names


def _targets(name: str) -> list[str]:
    """CLIPModel's names of the tensors that one of open_clip's becomes; empty if there are none."""
    if name in NAMES:
        return [NAMES[name]]
    block = BLOCK.fullmatch(name)
    if block is None or block[3] not in MODULES:
        return []
    model = "vision_model" if block[1] else "text_model"
    return [f"{model}.encoder.layers.{block[2]}.{module}.{block[4]}" for module in MODULES[block[3]]]
