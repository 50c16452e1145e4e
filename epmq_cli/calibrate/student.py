"""The model that is being quantized, and its counterparts in merge, base and experts, by module and tensor name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.reference_weights import ReferenceWeights, copy_into
from epmq_cli.families.family import Family
from epmq_cli.quantize.layer_problem import Affine


@dataclass(frozen=True)
class Student:
    """`model`, whose tensors are replaced one after the other; `dtype`: the type they are stored in."""

    model: nn.Module
    family: Family
    reference: ReferenceWeights
    guidance: Guidance
    dtype: torch.dtype
    _changed: set[str] = field(default_factory=set)

    def own(self, name: str) -> Tensor:
        """A copy of the model's tensor."""
        return self.model.get_parameter(name).detach().clone()

    def anchor(self, name: str) -> Tensor:
        """The anchor of a tensor: the model's own value, moved away from the base's by rho."""
        own, rho = self.own(name), float(self.guidance.rho)
        return own if rho == 1 else rho * own + (1 - rho) * self.reference.base(name).to(own.device)

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert, on the model's device."""
        return self.reference.expert(task, name).to(self.model.get_parameter(name).device)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """New values of tensors, rounded to the type they are stored in."""
        copy_into(self.model, {name: tensor.to(self.dtype).float() for name, tensor in tensors.items()})
        self._changed.update(tensors)

    def take_changed(self) -> list[str]:
        """The names of the tensors that `put` replaced since this was last asked."""
        changed = sorted(self._changed)
        self._changed.clear()
        return changed

    def affine_anchor(self, module: str) -> Affine:
        """`anchor` of a linear's or norm's weight and, where it has one, bias."""
        return Affine(self.anchor(f"{module}.weight"), self.anchor(f"{module}.bias") if self._biased(module) else None)

    def affine_expert(self, task: str, module: str) -> Affine:
        """`expert` likewise."""
        bias = self.expert(task, f"{module}.bias") if self._biased(module) else None
        return Affine(self.expert(task, f"{module}.weight"), bias)

    def put_affine(self, module: str, weight: Tensor, bias: Tensor | None) -> None:
        """`put` likewise."""
        self.put({f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias}))

    def _biased(self, module: str) -> bool:
        return getattr(self.model.get_submodule(module), "bias", None) is not None
