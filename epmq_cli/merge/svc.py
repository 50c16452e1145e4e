"""Singular value calibration: rescales the directions of a merge by their shares in the task vectors, so that those of
several task vectors count once (2026, https://arxiv.org/abs/2602.05536, section 4, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.matrices import TaskVectors
from epmq_cli.merge.method import PostRule
from epmq_cli.merge.parameters import Choice, Number
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor


def calibrate(merged: Tensor, vectors: TaskVectors, alpha: float) -> Tensor:
    """A merged task vector U S V' (out, in) with S times K / sum_i max(alpha, s_i), computed in float64.

    For each of the K task vectors T_i and each left singular vector u, s_i is the coefficient of the projection of u'
    U S V' on u' T_i; zero where u' T_i is zero. Holds one task vector at a time.
    """
    U, S, Vh = torch.linalg.svd(merged.double(), full_matrices=False)
    total = torch.zeros_like(S)
    for task in vectors:
        response = U.T @ vectors[task].double()  # (r, in)
        sizes = response.square().sum(1).clamp(min=torch.finfo(S.dtype).tiny)
        total += (S * (Vh * response).sum(1) / sizes).clamp(min=alpha)
    calibrated: Tensor = (U * (len(vectors) * S / total)) @ Vh
    return calibrated.to(merged.dtype)


@dataclass(frozen=True)
class SingularValueCalibration:
    """The post-processor `svc`."""

    summary: ClassVar[str] = (
        "Singular value calibration: rescales the directions of the merge by their shares in the task vectors, so that "
        "shared ones count once (2026, https://arxiv.org/abs/2602.05536)."
    )

    alpha: Annotated[
        float | None,
        Number(0, 10, open_low=True, null=True),
        "the smallest share that counts; directions grow at most by 1 / alpha. null for 1 / experts, with which small "
        "scales, such as 0.3, are undone; 1 only shrinks, for merges that count nothing twice, such as tsv_m",
    ] = None
    tables: Annotated[
        str,
        Choice(("keep", "merge")),
        "keep leaves embeddings and output layers over the vocabulary as merged; or merge, as all other matrices",
    ] = "keep"

    def fit(self, source: MergeSource) -> PostRule:
        """Returns the rule; reads no model."""
        alpha = 1 / len(source.tasks) if self.alpha is None else self.alpha
        kept = {name for name in source.names if self.tables == "keep" and source.is_over_vocabulary(name)}

        def rule(name: str, base: Tensor, experts: Mapping[str, Tensor], merged: Tensor) -> Tensor:
            if base.ndim != 2 or name in kept:
                return merged
            return base + calibrate(merged - base, TaskVectors(base, experts), alpha)

        return PostRule(rule, on_device=True)
