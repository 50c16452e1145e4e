"""`refine=distill`: trains the calibrated weights until the model's outputs for the calibration samples are those of
the experts (distillation, Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Calibration solves each layer alone;
training lets layers compensate for each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.data.batching import Batch, size, split
from epmq_cli.data.views import view
from epmq_cli.errors import ConfigError, literal
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.refine.hidden_states import chosen
from epmq_cli.refine.soft_labels import SoftLabels, outputs
from epmq_cli.refine.trained import DenseTensors, LowRankUpdates, Trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.refine.training import Example, Settings

AUTO = "auto"
LARGEST = 0.0003
"""The learning rate of `auto` for experts far apart."""
SHARE = 0.12
"""The learning rate of `auto` for experts near each other, relative to their distance from the merged weights."""


@dataclass(frozen=True)
class Distill:
    """The options of conf/refine/distill.yaml."""

    trained: str
    rank: int
    optimizer: str
    views: int
    temperature: float
    features: float
    hidden: float
    hidden_blocks: Sequence[int] | None
    anchor: float
    lr: Any
    epochs: int
    patience: int
    packed: str
    packed_epochs: int
    packed_lr: float
    batch_size: int
    warmup: float
    precision: str
    checkpointing: bool
    moments: str
    top: int

    def __post_init__(self) -> None:
        check_choice("refine.trained", self.trained, ("all", "lora", "norms"))
        check_range("refine.rank", self.rank, 1, 1 << 16, integer=True)
        check_choice("refine.optimizer", self.optimizer, ("muon", "adamw"))
        check_range("refine.views", self.views, 1, 10_000, integer=True)
        if self.hidden_blocks is not None and not isinstance(self.hidden_blocks, list | tuple):
            raise ConfigError(f"refine.hidden_blocks must be a list such as [2, 5], got {literal(self.hidden_blocks)}")
        for number in self.hidden_blocks or ():
            check_range("refine.hidden_blocks", number, 0, 1 << 16, integer=True)
        check_range("refine.temperature", self.temperature, 0, 100, open_low=True)
        for name in ("features", "hidden", "anchor"):
            check_range(f"refine.{name}", getattr(self, name), 0, 1e9)
        if self.lr != AUTO:
            if not isinstance(self.lr, int | float | list | tuple) or isinstance(self.lr, bool) or self.lr == []:
                given = literal(self.lr)
                raise ConfigError(f"refine.lr must be auto, a number or a list such as [0.001, 0.0003], got {given}")
            for lr in self.rates(math.inf):
                check_range("refine.lr", lr, 0, 1, open_low=True)
        for name in ("epochs", "packed_epochs"):
            check_range(f"refine.{name}", getattr(self, name), 0, 10_000, integer=True)
        if not self.epochs + self.packed_epochs:
            raise ConfigError("refine.epochs and refine.packed_epochs are both 0; use refine=none, or raise one")
        check_range("refine.patience", self.patience, 1, 10_000, integer=True)
        check_choice("refine.packed", self.packed, ("scales", "codes"))
        check_range("refine.packed_lr", self.packed_lr, 0, 1, open_low=True)
        check_range("refine.batch_size", self.batch_size, 1, 1 << 20, integer=True)
        check_range("refine.warmup", self.warmup, 0, 1)
        check_choice("refine.precision", self.precision, ("auto", "float32", "bfloat16"))
        check_choice("refine.checkpointing", self.checkpointing, (True, False))
        check_choice("refine.moments", self.moments, ("device", "cpu"))
        check_range("refine.top", self.top, 1, 1 << 20, integer=True)

    def rates(self, distance: float) -> list[float]:
        """The learning rates, in the order in which they are tried. `distance`: of the experts' weights from the merged
        ones, root mean square; `auto` goes by it, so that a step is a small part of the way to the experts."""
        if self.lr == AUTO:
            return [min(LARGEST, SHARE * distance)]
        return list(self.lr) if isinstance(self.lr, list | tuple) else [self.lr]

    def names(self, model: nn.Module, merged: Sequence[str]) -> list[str]:
        """The merged tensors that are trained."""
        own = dict(model.named_parameters())
        return self.norms(model, merged) if self.trained == "norms" else [name for name in merged if name in own]

    def norms(self, model: nn.Module, merged: Sequence[str]) -> list[str]:
        """The merged tensors of norms, and the merged biases."""
        norms = {
            f"{name}.{part}"
            for name, module in model.named_modules()
            if type(module).__name__.lower().endswith(("norm", "norm1d"))
            for part, _ in module.named_parameters(recurse=False)
        }
        own = dict(model.named_parameters())
        return [name for name in merged if name in norms or (name in own and name.endswith("bias"))]

    def blocks(self, model: nn.Module, family: Family) -> tuple[int, ...]:
        """The numbers of the blocks whose hidden states are trained. ConfigError if the model has no such block."""
        return chosen(self.hidden_blocks, family, model) if self.hidden else ()

    def updates(self, model: nn.Module, family: Family, seed: int) -> Trained:
        """What is trained of the dense model's tensors."""
        from epmq_cli.refine.training import matrices  # imports torch

        return LowRankUpdates(matrices(family, model), self.rank, seed) if self.trained == "lora" else DenseTensors()

    def settings(self, device: torch.device, packed: bool = False) -> Settings:
        """The settings of the training on a device. `packed`: of the packed model."""
        from epmq_cli.refine.training import Settings  # imports torch

        fast = device.type == "cuda" and torch.cuda.is_bf16_supported() if self.precision == "auto" else False
        return Settings(
            optimizer=self.optimizer,
            temperature=self.temperature,
            features=self.features,
            hidden=self.hidden,
            hidden_blocks=self.hidden_blocks,
            anchor=self.anchor,
            epochs=self.packed_epochs if packed else self.epochs,
            patience=self.patience,
            warmup=self.warmup,
            dtype=torch.bfloat16 if fast or self.precision == "bfloat16" else torch.float32,
            checkpointing=self.checkpointing,
            moments=torch.device("cpu") if self.moments == "cpu" else None,
        )

    def labelled(
        self, batches: Sequence[Batch], views: int, seed: int, label: Callable[[Batch], SoftLabels]
    ) -> list[list[Example]]:
        """The batches of a task in parts of `batch_size` samples, with the outputs of its expert for each view of them,
        which `label` computes."""
        from epmq_cli.refine.training import Example  # imports torch

        parts = [[own(part) for part in split(batch, self.batch_size) if size(part)] for batch in batches]
        return [
            [Example(part, [label(view(part, seed, number)) for number in range(views)], seed) for part in group]
            for group in parts
        ]

    def labels(self, model: nn.Module, family: Family, head: Head, batch: Batch, samples: int) -> SoftLabels:
        """The outputs of a model, some samples at a time."""
        from epmq_cli.models.fast_linears import fast_linears  # imports torch

        top, blocks = self.top if family.vocabulary else None, self.blocks(model, family)
        with torch.no_grad(), fast_linears(model):
            found = [
                SoftLabels.of(outputs(family, model, part, head, blocks), self.temperature, top)
                for part in split(batch, samples)
            ]
        return SoftLabels.joined(found)


def own(batch: Mapping[str, Tensor]) -> Batch:
    """A batch whose tensors can take part in training: those of inference mode cannot."""
    return {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in batch.items()}
