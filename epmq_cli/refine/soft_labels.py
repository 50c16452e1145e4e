"""What a student is trained on: the experts' features and logits for the samples of their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.data.batching import Batch
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.refine.hidden_states import captured

if TYPE_CHECKING:
    from torch import Tensor, nn

SMALLEST = 1e-9  # probability of the classes that are not kept


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for a batch: `logits` (rows, classes), and `features` (rows, width) where there are heads.
    `hidden`: the hidden states (tokens, width) behind some blocks. `numbers`: whether `logits` are numbers, such as
    embeddings, and not of classes.

    Rows are samples, or the real tokens of families without heads, whose classes are the vocabulary.
    """

    logits: Tensor
    features: Tensor | None
    hidden: tuple[Tensor, ...] = ()
    numbers: bool = False


def outputs(family: Family, model: nn.Module, batch: Batch, head: Head, blocks: Sequence[int] = ()) -> Outputs:
    """The model's outputs, with the head of the batch's task. `blocks`: whose hidden states are kept, by number."""
    with captured(family, model, batch, blocks) as hidden:
        if not family.vocabulary:
            features = family.features(model, batch)
            kept = tuple(hidden[number] for number in blocks)
            return Outputs(family.logits(model, features, head), features, kept, family.numbers)
        logits: Tensor = model(**batch, use_cache=False).logits.float()
    mask = family.stacks(model)[-1].mask(batch)
    rows = logits.flatten(0, 1) if mask is None else logits[mask]
    return Outputs(rows, None, tuple(hidden[number] for number in blocks))


@dataclass(frozen=True)
class SoftLabels:
    """An expert's outputs for a batch.

    `kept`: its log-probabilities (rows, kept) at the temperature, the largest ones. `classes`: their classes
    (rows, kept); None if all classes are kept in order. `numbers`: `kept` are numbers instead, of heads with one output
    and of embeddings. `features`, `hidden`: as in `Outputs`.
    """

    kept: Tensor
    classes: Tensor | None
    features: Tensor | None
    hidden: tuple[Tensor, ...] = ()
    numbers: bool = False

    @classmethod
    def of(cls, expert: Outputs, temperature: float, top: int | None) -> SoftLabels:
        """Keeps the `top` largest log-probabilities of each row; None for all."""
        if expert.numbers or expert.logits.shape[1] == 1:
            return cls(expert.logits, None, expert.features, expert.hidden, True)
        chances = (expert.logits / temperature).log_softmax(-1)
        if top is None or top >= chances.shape[1]:
            return cls(chances, None, expert.features, expert.hidden)
        kept, classes = chances.topk(top)
        return cls(kept, classes, expert.features, expert.hidden)

    @classmethod
    def joined(cls, parts: Sequence[SoftLabels]) -> SoftLabels:
        """The labels of the parts of a batch, one after the other."""
        kept, classes, features = zip(*((part.kept, part.classes, part.features) for part in parts), strict=True)
        hidden = zip(*(part.hidden for part in parts), strict=True)
        numbers = parts[0].numbers
        return cls(torch.cat(kept), _joined(classes), _joined(features), tuple(map(torch.cat, hidden)), numbers)

    def rows(self, rows: slice) -> SoftLabels:
        """The labels of some rows, without hidden states."""
        classes, features = (None if part is None else part[rows] for part in (self.classes, self.features))
        return SoftLabels(self.kept[rows], classes, features, numbers=self.numbers)

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        """T^2 KL(expert || student) of each row, (rows,), for the student's logits (rows, classes).

        Classes that are not kept count as one class. Numbers are means of Gaussians of variance 1: half the squared
        difference, which of embeddings of length 1 is one minus their cosine.
        """
        if self.numbers:
            return (logits - self.kept).square().sum(-1) / 2
        own = (logits / temperature).log_softmax(-1)
        if self.classes is None:
            return temperature**2 * (self.kept.exp() * (self.kept - own)).sum(-1)
        own = own.gather(1, self.classes)
        rest, own_rest = (_log_rest(part) for part in (self.kept, own))
        inside = (self.kept.exp() * (self.kept - own)).sum(-1)
        return temperature**2 * (inside + rest.exp() * (rest - own_rest))

    def agreements(self, logits: Tensor) -> Tensor:
        """Whether the expert's most likely class is that of the student's logits (rows, classes), for each row; numbers
        always agree."""
        if self.numbers:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        own, wanted = logits.argmax(-1, keepdim=True), self.kept.argmax(-1, keepdim=True)
        return (own == (wanted if self.classes is None else self.classes.gather(1, wanted)))[:, 0]

    def squared_error(self, features: Tensor) -> Tensor:
        """The squared distance of each row's features from the expert's, (rows,)."""
        assert self.features is not None
        return (features - self.features).square().sum(-1)

    def hidden_error(self, hidden: Sequence[Tensor], starts: Sequence[int], spreads: Sequence[float]) -> Tensor:
        """The squared distance of a part's hidden states from the expert's, relative to the variance: of each block,
        then the mean over the blocks. Summed over the parts of a batch, it is the mean over the batch's tokens.

        `starts`: the place of the part's first token in the batch, by block. `spreads`: the variances.
        """
        total = hidden[0].new_zeros(())
        for own, expert, start, spread in zip(hidden, self.hidden, starts, spreads, strict=True):
            error = (own - expert[start : start + len(own)]).square().sum()
            total = total + error / (len(expert) * len(hidden) * spread if spread else float("inf"))
        return total


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _log_rest(chances: Tensor) -> Tensor:
    """The logarithm of the probability of all other classes, (rows,)."""
    return (1 - chances.exp().sum(-1)).clamp(min=SMALLEST).log()
