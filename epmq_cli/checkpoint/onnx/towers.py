"""Encoders as graphs: the inputs and outputs of each, by the names that optimum gives them.

A kind of model is a row of `TOWERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epmq_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ROWS, TOKENS = 2, 8  # of the example with which a tower is traced


class Graph(nn.Module):
    """The module that becomes a graph. `outputs`: the names of what its forward pass returns."""

    outputs: tuple[str, ...]


class ClipImages(Graph):
    """CLIP's vision tower and projection: pixels (batch, 3, height, width) -> image embeddings (batch, width)."""

    outputs = ("image_embeds",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings: Tensor = self.projection(self.body(pixel_values).pooler_output)
        return embeddings


class ClipTexts(Graph):
    """CLIP's text tower and projection: tokens (batch, sequence) -> text embeddings (batch, width)."""

    outputs = ("text_embeds",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.projection = model.text_model, model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.body(input_ids=input_ids, attention_mask=attention_mask)
        embeddings: Tensor = self.projection(found.pooler_output)
        return embeddings


class Encoder(Graph):
    """An encoder: its inputs -> hidden states (batch, sequence, width), and those of the pooler if it has one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = model
        pooled = getattr(model, "pooler", None) is not None
        self.outputs = ("last_hidden_state", "pooler_output") if pooled else ("last_hidden_state",)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.body(**inputs)
        return tuple(found[name] for name in self.outputs)


@dataclass(frozen=True)
class Tower:
    """`module` makes a graph of a model; `pixels`: whether it reads images."""

    module: Callable[[Any], Graph]
    pixels: bool


TEXT_TYPES = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "deberta-v2",
    "electra",
    "modernbert",
    "mpnet",
]
TEXTS, IMAGES = Tower(Encoder, False), Tower(Encoder, True)
TOWERS: Mapping[str, Mapping[str, Tower]] = {
    "clip": {"vision": Tower(ClipImages, True), "text": Tower(ClipTexts, False)},
    **{kind: {"vision": IMAGES} for kind in ("vit", "deit")},
    **{kind: {"text": TEXTS} for kind in TEXT_TYPES},
}
"""By `model_type` of config.json; the first one is the default."""


def tower_of(config: Mapping[str, Any], name: str | None) -> Tower:
    """The tower of this name, or the first one, of a config.json. ConfigError if the model has none."""
    kind = str(config.get("model_type"))
    if kind not in TOWERS:
        raise ConfigError(
            f"epmq export writes ONNX for encoders ({', '.join(TOWERS)}), got the model type {kind}; llama.cpp (a file "
            "in .gguf) and vLLM are for decoders"
        )
    towers = TOWERS[kind]
    if name is not None and name not in towers:
        raise ConfigError(f"--tower must be one of {', '.join(towers)} for a model of the type {kind}, got {name}")
    return towers[name or next(iter(towers))]


def example(tower: Tower, config: Any) -> dict[str, Tensor]:
    """Inputs with which a tower is traced, by name."""
    if tower.pixels:
        own = getattr(config, "vision_config", config)
        return {"pixel_values": torch.zeros(ROWS, own.num_channels, own.image_size, own.image_size)}
    shape = (ROWS, TOKENS)
    inputs = {"input_ids": torch.ones(shape, dtype=torch.int64), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    return inputs


def axes(tower: Tower) -> dict[int, str]:
    """The names of the axes that may have any size, in every input."""
    return {0: "batch"} if tower.pixels else {0: "batch", 1: "sequence"}
