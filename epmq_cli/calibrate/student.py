"""The model that is being quantized, and its counterparts in merge, base and experts, by module and tensor name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.norms import unit
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.reference_weights import ReferenceWeights, copy_into
from epmq_cli.families.family import Family


@dataclass(frozen=True)
class Student:
    """`model`, whose tensors are replaced one after the other; `dtype`: the type they are stored in."""

    model: nn.Module
    family: Family
    reference: ReferenceWeights
    guidance: Guidance
    dtype: torch.dtype
    _changed: set[str] = field(default_factory=set)
    _multiplied: dict[str, Tensor] = field(default_factory=dict)  # scales (in,) of linears, see `fold`
    _divided: dict[str, Tensor] = field(default_factory=dict)  # scales (out,) of their producers

    def own(self, name: str) -> Tensor:
        """A copy of the model's tensor."""
        return self.model.get_parameter(name).detach().clone()

    def anchor(self, name: str) -> Tensor:
        """The anchor of a tensor: the model's own value, moved away from the base's by rho."""
        own, rho = self.own(name), float(self.guidance.rho)
        if rho == 1:
            return own
        base = self.reference.base(name).to(own.device)
        return rho * own + (1 - rho) * self._folded(name, base, self._multiplied, self._divided)

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert, on the model's device."""
        found = self.reference.expert(task, name).to(self.model.get_parameter(name).device)
        return self._folded(name, found, self._multiplied, self._divided)

    def fold(self, producer: str, readers: Sequence[str], scales: Tensor) -> None:
        """Multiplies the input channels of linears by scales (in,) and divides what their producer gives by them; from
        here on base and experts have the scales too.

        Weights that will be quantized are not rounded to the type that they are stored in.
        """
        multiplied, holdout_split = dict.fromkeys(readers, scales), {producer: scales}
        linear = self.own(f"{producer}.weight").ndim > 1
        kept = [f"{producer}.bias"] if self._biased(producer) else []
        replaced = [f"{reader}.weight" for reader in readers]
        (replaced if linear else kept).append(f"{producer}.weight")
        for names, put in ((replaced, partial(copy_into, self.model)), (kept, self.put)):
            put({name: self._folded(name, self.own(name), multiplied, holdout_split) for name in names})
        self._multiplied.update(multiplied)
        self._divided.update(holdout_split)

    def read_scales(self, module: str) -> Tensor | None:
        """The scales of a linear's input channels; None where nothing is folded."""
        return self._multiplied.get(module)

    def _folded(
        self, name: str, tensor: Tensor, multiplied: Mapping[str, Tensor], holdout_split: Mapping[str, Tensor]
    ) -> Tensor:
        """A tensor of this name with the scales of these linears and producers."""
        module, _, part = name.rpartition(".")
        if module in multiplied and part == "weight":
            tensor = tensor * multiplied[module]
        if module in holdout_split:
            scales = holdout_split[module]
            added = unit(self.model.get_submodule(module)) if part == "weight" and tensor.ndim == 1 else 0.0
            tensor = (tensor + added) / (scales[:, None] if tensor.ndim > 1 else scales) - added
        return tensor

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

    def stacked_anchor(self, modules: Sequence[str]) -> Affine:
        """`affine_anchor` of linears that read the same input, as one linear."""
        return Affine.stacked([self.affine_anchor(module) for module in modules])

    def affine_expert(self, task: str, module: str) -> Affine:
        """`expert` likewise."""
        bias = self.expert(task, f"{module}.bias") if self._biased(module) else None
        return Affine(self.expert(task, f"{module}.weight"), bias)

    def put_affine(self, module: str, weight: Tensor, bias: Tensor | None) -> None:
        """`put` likewise."""
        self.put({f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias}))

    def _biased(self, module: str) -> bool:
        return getattr(self.model.get_submodule(module), "bias", None) is not None
