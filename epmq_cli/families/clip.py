"""CLIP (https://arxiv.org/abs/2103.00020) as transformers has it: the vision tower is merged and quantized.

Base: a `CLIPModel`. Experts: `CLIPVisionModel` or `CLIPModel`, whose visual projection is merged too where one of them
has trained it. The text tower stays the base's. A head is the class embeddings of the base's text tower, or under
`heads: expert` of the expert's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.suite import Task
from epmq_cli.errors import ConfigError, ModelError, shown
from epmq_cli.families.family import Experts, Family, Head
from epmq_cli.families.heads import zero_shot
from epmq_cli.families.parts import block_settings
from epmq_cli.families.processors import images, tokens
from epmq_cli.families.structure import Linears, Norm, Patches, Section
from epmq_cli.families.text_tower import PARTS, PROJECTION, drifts, own_text_tower, swapped, tell
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import from_folder
from epmq_cli.models.processor_folder import Processor, processor_files

PREFIX = "vision_model."
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
LAST = 2  # as eos_token_id: that of old configs, with which transformers takes the largest id of a text
READOUT = (Norm(PREFIX + "post_layernorm"), Linears(("visual_projection",)))


class _Readout(nn.Module):
    """The end of a CLIPModel's vision tower and the projection, under their names in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.post_layernorm = model.get_submodule(PREFIX + "post_layernorm")
        self.visual_projection = model.get_submodule("visual_projection")

    def forward(self, hidden: Tensor) -> Tensor:
        """Image embeddings (samples, projection width) of the class token."""
        norm = self.vision_model.get_submodule("post_layernorm")
        features: Tensor = self.visual_projection(norm(hidden[:, 0]))
        return features


class Clip(Family):
    """`family: clip`."""

    sample_types = (Image,)
    model_types = ("clip", "clip_vision_model")
    stem = (
        Patches(
            convolution=PREFIX + "embeddings.patch_embedding",
            positions=PREFIX + "embeddings.position_embedding",
            class_token=PREFIX + "embeddings.class_embedding",
        ),
    )
    first_norm = PREFIX + "pre_layrnorm"
    kept = (r"text_model\..*", r"text_projection\.weight", "logit_scale", r".*\.position_ids")  # the base's
    read_token = 0
    reads = "pictures"
    heads = "made"
    head_parts = ("weight",)
    head_width = "projection_dim"
    dequantize_on_load = True  # get_image_features goes round the call of the whole model

    def check_task(self, task: Task) -> None:
        """Classes and templates, of which its head is made."""
        if not task.classes or not task.templates:
            raise ConfigError(
                f"suite.tasks.{task.name} needs classes and templates, from which family clip makes its head, got "
                f"{shown(task.classes)} and {shown(task.templates)}"
            )

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The vision tower. transformers 5 stores a CLIPVisionModel without the prefix that a CLIPModel has: both are
        read."""
        self.check_type(folder)
        names = self.all_names(folder)
        tower = {name: stored for name, stored in names.items() if name.startswith(PREFIX)}
        return {name: stored for name, stored in tower.items() if not name.endswith("position_ids")}

    def all_names(self, folder: ModelFolder) -> dict[str, str]:
        """All stored tensors, those of a vision tower alone with its prefix."""
        prefixed = any(name.startswith(PREFIX) for name in folder.infos)
        beside = {name for name in folder.infos if prefixed or name.partition(".")[0] in PARTS}
        return {name if name in beside else PREFIX + name: name for name in folder.infos}

    def trained_beside(self, base: ModelFolder, experts: Experts, tasks: Sequence[Task]) -> list[str]:
        """The visual projection, where an expert has trained it."""
        found = {task.name: drifts(base, experts[task.name]) for task in tasks}
        merged = any("visual_projection" in parts for parts in found.values())
        for task in tasks:
            tell(experts[task.name], task, found[task.name], merged)
        return [PROJECTION] if merged else []

    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """Those of the vision tower."""
        return block_settings(folder, "vision_config")

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """A CLIPModel."""
        from transformers import CLIPModel

        model: nn.Module = from_folder(CLIPModel, folder, **options)
        return model

    def blocks(self, model: nn.Module) -> list[Section]:
        """The layers of the vision encoder."""
        layers = model.get_submodule(PREFIX + "encoder.layers")
        return [Section(f"{PREFIX}encoder.layers.{index}", layer, STEPS) for index, layer in layers.named_children()]

    def readout(self, model: nn.Module) -> Section:
        """The last layer norm and the projection of the class token."""
        return Section("", _Readout(model), READOUT)

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pictures through the image processor, as RGB."""
        return images(folder, processor)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Image embeddings after the projection: (samples, projection width), not normalised."""
        output = model.get_image_features(**batch)  # type: ignore[operator]
        features: Tensor = output.pooler_output
        return features

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """`weight` (classes, projection width): the class embeddings, each of length 1, made by the text tower of the
        base or, where the task says so, of the expert."""
        classes, templates = task.classes or (), task.templates or ()
        settings: Any = model.config
        end = settings.text_config.eos_token_id
        longest = settings.text_config.max_position_embeddings
        own = own_text_tower(expert, model.state_dict()) if task.heads == "expert" else {}
        reader = Processor(expert.path) if own and processor_files(expert.path, "texts") else None
        tokenizer = tokens(base, longest, reader)

        def embed(texts: list[str]) -> Tensor:
            _check_fits(tokenizer(texts, padding=True, verbose=False), texts, longest, task.name)
            read = tokenizer(texts, padding=True, truncation=True)
            if not _ends(read["input_ids"], end):
                raise ModelError(
                    f"{base / 'config.json'} has a text_config.eos_token_id of {shown(end)}, at which the embedding of "
                    "a text is read, and the tokenizer beside it does not end texts with that; fetch both again"
                )
            embedding: Tensor = model.get_text_features(**read.to(device)).pooler_output  # type: ignore[operator]
            return embedding

        with swapped(model, own):
            return {"weight": zero_shot.class_embeddings(embed, classes, templates)}

    def head_inputs(self, features: Tensor, head: Head) -> Tensor:
        """The features, each of length 1."""
        return normalize(features, dim=-1)

    def logits(self, features: Tensor, head: Head) -> Tensor:
        """100 x cosine; a head that was solved again is no longer of unit rows."""
        return zero_shot.logits(features, head["weight"])


def _check_fits(read: Any, texts: list[str], longest: int, task: str) -> None:
    """ConfigError where a text has more tokens than the text tower reads: what is cut off may be the class."""
    lengths = read["attention_mask"].sum(1).tolist()
    long = next((index for index, length in enumerate(lengths) if length > longest), None)
    if long is not None:
        raise ConfigError(
            f"suite.tasks.{task}: {texts[long]!r}, made of a class and a template, has {lengths[long]} tokens, and the "
            f"base's text tower reads at most {longest}; shorten one of them"
        )


def _ends(ids: Tensor, end: object) -> bool:
    """Whether each text (texts, tokens) has, behind its first token, the one at which transformers reads its embedding.
    Otherwise that reads the first token, which knows nothing of the text."""
    if end == LAST or not isinstance(end, int):
        return end == LAST
    return bool(((ids == end).int().argmax(1) > 0).all())
