"""Norms of task vectors, cosines between them, conflicts of signs, and what TIES would drop, by block and tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epmq_cli.config.validate import check_range
from epmq_cli.errors import ModelError
from epmq_cli.merge.method import Piece
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.ties import trim_thresholds
from epmq_cli.runtime.progress import track

BLOCK = re.compile(r"^(.*?\.\d+)\.")
OUTSIDE = "outside"
"""The name of the tensors that are in no block."""


@dataclass
class Sums:
    """Sums over the elements of some tensors.

    `gram` (experts, experts): products of task vectors. `base`: squares of the base. `changed`: elements that an expert
    changes. `conflicts`: those whose task vectors have both signs. By expert, (experts,): `nonzero`, the elements that
    it changes; `kept`, those that TIES keeps; `outvoted`, those among them whose sign is not the elected one.
    """

    gram: Tensor
    nonzero: Tensor
    kept: Tensor
    outvoted: Tensor
    base: float = 0.0
    elements: int = 0
    changed: int = 0
    conflicts: int = 0

    @classmethod
    def zeros(cls, experts: int) -> Sums:
        """Sums over nothing."""
        nonzero, kept, outvoted = (torch.zeros(experts, dtype=torch.int64) for _ in range(3))
        return cls(torch.zeros(experts, experts, dtype=torch.float64), nonzero, kept, outvoted)

    def add(self, piece: Piece, thresholds: Tensor) -> None:
        """Adds a piece. `thresholds` (experts,): the smallest magnitudes that TIES keeps."""
        vectors = torch.stack(list(piece.task_vectors().values()))
        kept = (vectors.abs() >= thresholds[:, None]) & (vectors != 0)
        elected = torch.where(kept, vectors, 0).sum(0)
        positive, negative = (vectors > 0).any(0), (vectors < 0).any(0)
        wide = vectors.double()
        self.gram += wide @ wide.T
        self.base += float(piece.base.double().square().sum())
        self.elements += vectors.shape[1]
        self.changed += int((positive | negative).sum())
        self.conflicts += int((positive & negative).sum())
        self.nonzero += (vectors != 0).sum(1)
        self.kept += kept.sum(1)
        self.outvoted += (kept & (vectors * elected < 0)).sum(1)

    def merge(self, other: Sums) -> None:
        """Adds the sums over other tensors."""
        for name in ("gram", "nonzero", "kept", "outvoted", "base", "elements", "changed", "conflicts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def content(self, tasks: list[str]) -> dict[str, Any]:
        """Norms, cosines with the mean of those between two experts (None with one), and shares; those of an expert are
        of the elements that it changes. A share of nothing is 0."""
        norms = self.gram.diagonal().sqrt()
        scale = torch.where(norms > 0, norms, 1.0)
        cosines, count = self.gram / scale[:, None] / scale, len(tasks)
        mean = float(cosines.sum() - cosines.trace()) / (count * (count - 1)) if count > 1 else None
        own = self.nonzero.clamp(min=1)
        trimmed, outvoted = (self.nonzero - self.kept) / own, self.outvoted / own
        return {
            "elements": self.elements,
            "base_norm": self.base**0.5,
            "norms": dict(zip(tasks, norms.tolist(), strict=True)),
            "cosines": {
                task: dict(zip(tasks, row, strict=True)) for task, row in zip(tasks, cosines.tolist(), strict=True)
            },
            "cosine": mean,
            "sign_conflicts": self.conflicts / max(self.changed, 1),
            "trimmed": dict(zip(tasks, trimmed.tolist(), strict=True)),
            "outvoted": dict(zip(tasks, outvoted.tolist(), strict=True)),
        }


@dataclass
class ByTensor:
    """The sums of each tensor."""

    experts: int
    tensors: dict[str, Sums] = field(default_factory=dict)

    def of(self, name: str) -> Sums:
        """The sums of a tensor."""
        return self.tensors.setdefault(name, Sums.zeros(self.experts))

    def blocks(self) -> dict[str, Sums]:
        """The sums of each block of layers."""
        blocks: dict[str, Sums] = {}
        for name, own in self.tensors.items():
            match = BLOCK.match(name)
            blocks.setdefault(match[1] if match else OUTSIDE, Sums.zeros(self.experts)).merge(own)
        return blocks

    def total(self) -> Sums:
        """The sums over all tensors."""
        total = Sums.zeros(self.experts)
        for own in self.tensors.values():
            total.merge(own)
        return total


def task_vector_content(source: MergeSource, density: float) -> tuple[dict[str, Any] | None, list[str]]:
    """The task vectors of all experts, and what a run would refuse of their values: then no numbers are given.

    `density`: the share of each task vector that TIES keeps, over the whole vector.
    """
    check_range("--density", density, 0, 1, open_low=True)
    if problems := _not_finite(source):
        return None, problems
    thresholds = torch.tensor(trim_thresholds(source, density))
    by_tensor = ByTensor(len(source.tasks))
    for name in track(source.names, "compare task vectors"):
        own = by_tensor.of(name)
        for reader in source.pieces(name):
            own.add(reader(), thresholds)
    blocks = [{"block": name, **own.content(source.tasks)} for name, own in by_tensor.blocks().items()]
    tensors = [
        {"tensor": name, "shape": list(source.shape(name)), **_means(own.content(source.tasks))}
        for name, own in by_tensor.tensors.items()
    ]
    thresholds_of: Mapping[str, float] = dict(zip(source.tasks, thresholds.tolist(), strict=True))
    total = by_tensor.total().content(source.tasks)
    return {
        "density": density, "thresholds": thresholds_of, "total": total, "blocks": blocks, "tensors": tensors
    }, []  # fmt: skip


def _means(content: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a tensor, with means over the experts in place of one for each."""

    def mean(key: str) -> float:
        return float(sum(content[key].values()) / len(content[key]))

    same = {key: content[key] for key in ("elements", "base_norm", "cosine", "sign_conflicts")}
    return {**same, "norm": mean("norms"), "trimmed": mean("trimmed"), "outvoted": mean("outvoted")}


def _not_finite(source: MergeSource) -> list[str]:
    """A run's sentence for each tensor with a NaN or an infinity."""
    sentences = []
    for name in track(source.names, "look for NaN"):
        for task in (None, *source.tasks):
            try:
                _ = source.base(name) if task is None else source.expert(task, name)
            except ModelError as error:
                sentences.append(str(error))
    return list(dict.fromkeys(sentences))
