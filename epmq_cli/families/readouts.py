"""Readouts behind the last block, as modules. Families import them where they build one: they import torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from epmq_cli.families.structure import Norm, Section


class FirstToken(nn.Module):
    """The readout of heads that read the first token of the last block's output."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, width) from (samples, tokens, width)."""
        return hidden[:, 0]


class AllTokens(nn.Module):
    """The readout of heads that pool the tokens of the last block's output."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, tokens, width), unchanged."""
        return hidden


class LastNorm(nn.Module):
    """The readout that norms one token, or all, under the norm's own name."""

    def __init__(self, model: nn.Module, name: str, token: int | None) -> None:
        super().__init__()
        self._name, self._token = name, token
        self.add_module(name, model.get_submodule(name))

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, width) of the token, or (samples, tokens, width) of all."""
        read = hidden if self._token is None else hidden[:, self._token]
        normed: Tensor = self.get_submodule(self._name)(read)
        return normed

    @classmethod
    def section(cls, model: nn.Module, path: str, token: int | None = None) -> Section:
        """The readout with the norm at this path."""
        prefix, _, name = path.rpartition(".")
        return Section(prefix, cls(model.get_submodule(prefix), name, token), (Norm(name),))


class NormedMean(nn.Module):
    """The readout that norms the mean of the tokens from a place on, under the norm's own name."""

    def __init__(self, norm: nn.Module, name: str, start: int) -> None:
        super().__init__()
        self._name, self._start = name, start
        self.add_module(name, norm)

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, width) from (samples, tokens, width)."""
        normed: Tensor = self.get_submodule(self._name)(hidden[:, self._start :].mean(1))
        return normed


class PatchMerging(nn.Module):
    """The norm and the linear behind a stage of Swin: each two by two neighbouring patches become one of twice the
    width. Pictures are squares."""

    def __init__(self, merging: nn.Module) -> None:
        super().__init__()
        self.norm, self.reduction = merging.get_submodule("norm"), merging.get_submodule("reduction")

    def forward(self, hidden: Tensor) -> Tensor:
        """(samples, patches / 4, 2 width) from (samples, patches, width)."""
        samples, patches, width = hidden.shape
        side = math.isqrt(patches)
        picture = nn.functional.pad(hidden.view(samples, side, side, width), (0, 0, 0, side % 2, 0, side % 2))
        corners = [picture[:, row::2, column::2] for column in range(2) for row in range(2)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, -1).flatten(1, 2)))
        return merged


class AttentionPooling(nn.Module):
    """The last norm of SigLIP's vision tower, and its head: a probe that attends to all tokens, and a feed-forward."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.post_layernorm, self.head = tower.get_submodule("post_layernorm"), tower.get_submodule("head")

    def forward(self, hidden: Tensor) -> Tensor:
        """Image embeddings (samples, 1, width) from (samples, tokens, width)."""
        normed, head = self.post_layernorm(hidden), self.head
        read: Tensor = head.attention(head.probe.repeat(len(hidden), 1, 1), normed, normed)[0]  # type: ignore[operator]
        embeddings: Tensor = read + head.mlp(head.layernorm(read))  # type: ignore[operator]
        return embeddings


class ProjectedToken(nn.Module):
    """The last norm of a CLIPModel's vision tower and the projection, under their names in the model. `tower`: the
    prefix of the tower."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.post_layernorm = model.get_submodule(f"{tower}post_layernorm")
        self.visual_projection = model.get_submodule("visual_projection")

    def forward(self, hidden: Tensor) -> Tensor:
        """Image embeddings (samples, projection width) of the class token."""
        norm = self.vision_model.get_submodule("post_layernorm")
        features: Tensor = self.visual_projection(norm(hidden[:, 0]))
        return features
