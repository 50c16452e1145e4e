"""The training with one learning rate: its record, and its state in a file, from which a later process continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from epmq_cli.calibrate.progress_file import opened, write_tensors

Optimizers = list[torch.optim.Optimizer]
STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of each tensor."""


@dataclass
class Trial:
    """The training with one learning rate. Before the first epoch and after each: the loss of the held-out samples, and
    the share of their rows for which student and expert agree on the class."""

    lr: float
    losses: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The epochs until the lowest loss, of those that agree with the experts as much as the start does."""
        epochs = [epoch for epoch, share in enumerate(self.agreements) if share >= self.agreements[0]]
        return min(epochs, key=lambda epoch: self.losses[epoch])

    @property
    def better(self) -> bool:
        """Whether the training lowers the held-out loss."""
        return self.best > 0


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
