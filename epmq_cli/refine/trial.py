"""The training with one learning rate: its record, and its state in a file, from which a later process continues."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.calibrate.progress_file import opened, write_tensors
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor

Optimizers = list[torch.optim.Optimizer]
STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of each tensor."""


CERTAIN = 1
"""How many standard errors a lower held-out loss must be away from the first one (the rule of one standard error,
Breiman et al. 1984). With few samples, the lowest loss of many epochs is lower by chance."""


@dataclass
class Trial:
    """The training with one learning rate. Before the first epoch and after each: the loss of the held-out samples, the
    share of their rows for which student and expert agree on the class, and the standard error of the difference of the
    loss from the first one."""

    lr: float
    losses: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, rows: Mapping[str, Tensor], first: Mapping[str, Tensor], weights: Mapping[str, float]) -> bool:
        """Adds the means of the tasks by their weights; False if the loss is not finite, which adds nothing.

        `rows`, `first`: losses and agreements of this process's held-out rows, (rows, 2) by task, now and before the
        first epoch.
        """
        means, variance, total = torch.zeros(2, dtype=torch.float64), 0.0, sum(weights.values())
        for task, own in rows.items():
            change = own[:, 0] - first[task][:, 0]
            parts = [torch.tensor([float(len(own))]), own.sum(0), change.sum()[None], change.square().sum()[None]]
            count, loss, agreement, sums, squares = distributed.all_reduce(torch.cat(parts).double()).tolist()
            means += weights[task] / total * torch.tensor([loss, agreement], dtype=torch.float64) / count
            spread = max(0.0, squares - sums**2 / count) / max(1.0, count - 1)
            variance += (weights[task] / total) ** 2 * spread / count
        if not math.isfinite(float(means[0])):
            return False
        for values, value in zip((self.losses, self.agreements), means.tolist(), strict=True):
            values.append(value)
        self.errors.append(math.sqrt(variance))
        return True

    @property
    def best(self) -> int:
        """The epochs until the lowest loss, of those that agree with the experts as much as the start does."""
        epochs = [epoch for epoch, share in enumerate(self.agreements) if share >= self.agreements[0]]
        return min(epochs, key=lambda epoch: self.losses[epoch])

    @property
    def idle(self) -> int:
        """The epochs since the lowest loss, whatever the classes are."""
        return len(self.losses) - 1 - self.losses.index(min(self.losses))

    @property
    def better(self) -> bool:
        """Whether the training lowers the held-out loss, by more than chance explains."""
        return self.losses[0] - self.losses[self.best] > CERTAIN * self.errors[self.best]


def save(
    path: Path, trial: Trial, best: Mapping[str, Tensor], copies: Mapping[str, Tensor], optimizers: Optimizers
) -> None:
    """Writes the state after an epoch: the trial, the best weights, the present ones and what optimizers keep."""
    tensors = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, copy in copies.items():
        tensors[f"own.{name}"] = copy.detach()
        for optimizer in optimizers:
            tensors |= {f"{part}.{name}": value for part, value in optimizer.state.get(copy, {}).items()}
    write_tensors(path, tensors, {"trial": asdict(trial)})


def restore(path: Path, copies: Mapping[str, Tensor], optimizers: Optimizers) -> tuple[Trial, dict[str, Tensor]]:
    """Reads the state after an epoch. Returns the trial and the best weights."""
    with opened(path) as (file, header):
        stored = set(file.keys())
        for name, copy in copies.items():
            copy.copy_(file.get_tensor(f"own.{name}"))
            state = {part: file.get_tensor(f"{part}.{name}") for part in STATE if f"{part}.{name}" in stored}
            [owner] = [each for each in optimizers if any(copy is tensor for tensor in each.param_groups[0]["params"])]
            owner.state[copy] = {part: value if part == "step" else value.to(copy) for part, value in state.items()}
        best = {name: file.get_tensor(f"best.{name}").to(copy) for name, copy in copies.items()}
        return Trial(**header["trial"]), best
