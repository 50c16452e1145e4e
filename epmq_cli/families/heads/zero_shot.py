"""Zero-shot image classification (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 100.0  # the logit scale of a trained CLIP and of the protocol


def class_embeddings(embed: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(classes, width), rows of length 1: for each class the normalized embeddings of all templates, averaged and
    normalized again.

    `embed` returns (texts, width) for a list of texts.
    """
    rows = []
    for name in classes:
        texts = [template.format(name) for template in templates]
        mean = torch.nn.functional.normalize(embed(texts), dim=-1).mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.stack(rows)


def logits(features: Tensor, embeddings: Tensor) -> Tensor:
    """100 x cosine between features (samples, width) and class embeddings (classes, width): (samples, classes)."""
    return SCALE * torch.nn.functional.normalize(features, dim=-1) @ embeddings.T
