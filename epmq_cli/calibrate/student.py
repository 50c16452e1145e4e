"""The model that calibration changes, and the corresponding tensors of base and experts, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.norms import unit
from epmq_cli.calibrate.quadratic import Affine
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.families.family import Family
from epmq_cli.models.weights import copy_into

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Student:
    """`model`: its tensors are replaced one after the other. `dtype`: the type in which the checkpoint stores them.
    `waiting`: where large sums are while nothing is added to them; None for the device that they are computed on.

    `dataclasses.replace` gives a student of the same model that has no changes and no folded scales.
    """

    model: nn.Module
    family: Family
    reference: ReferenceWeights
    guidance: Guidance
    dtype: torch.dtype
    waiting: torch.device | None = None
    _changed: set[str] = field(default_factory=set, init=False)
    _multipliers: dict[str, Tensor] = field(default_factory=dict, init=False)  # scales (in,) of linears, see `fold`
    _divisors: dict[str, Tensor] = field(default_factory=dict, init=False)  # scales (out,) of their producers

    def own(self, name: str) -> Tensor:
        """A copy of the model's tensor."""
        return self.model.get_parameter(name).detach().clone()

    def anchor(self, name: str) -> Tensor:
        """The anchor of a tensor: rho own + (1 - rho) base."""
        own, rho = self.own(name), float(self.guidance.rho)
        if rho == 1:
            return own
        base = self.reference.base(name).to(own.device)
        return rho * own + (1 - rho) * self._folded(name, base, self._multipliers, self._divisors)

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert, on the model's device."""
        tensor = self.reference.expert(task, name).to(self.model.get_parameter(name).device)
        return self._folded(name, tensor, self._multipliers, self._divisors)

    def fold(self, producer: str, readers: Sequence[str], scales: Tensor) -> None:
        """Multiplies the input channels of linears by scales (in,), and divides the outputs of their producer by them.
        Afterwards the tensors of base and experts have the same scales.

        Weights that will be quantized are not rounded to the stored type.
        """
        multipliers, divisors = dict.fromkeys(readers, scales), {producer: scales}
        linear = self.own(f"{producer}.weight").ndim > 1
        rounded = [f"{producer}.bias"] if self._biased(producer) else []
        replaced = [f"{reader}.weight" for reader in readers]
        (replaced if linear else rounded).append(f"{producer}.weight")
        for names, put in ((replaced, partial(copy_into, self.model)), (rounded, self.put)):
            put({name: self._folded(name, self.own(name), multipliers, divisors) for name in names})
        self._multipliers.update(multipliers)
        self._divisors.update(divisors)

    def read_scales(self, module: str) -> Tensor | None:
        """The scales of a linear's input channels; None if nothing is folded into it."""
        return self._multipliers.get(module)

    def _folded(
        self, name: str, tensor: Tensor, multipliers: Mapping[str, Tensor], divisors: Mapping[str, Tensor]
    ) -> Tensor:
        """The tensor of this name with the scales of these linears and producers applied."""
        module, _, part = name.rpartition(".")
        if module in multipliers and part == "weight":
            tensor = tensor * multipliers[module]
        if module in divisors:
            scales = divisors[module]
            added = unit(self.model.get_submodule(module)) if part == "weight" and tensor.ndim == 1 else 0.0
            tensor = (tensor + added) / (scales[:, None] if tensor.ndim > 1 else scales) - added
        return tensor

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces tensors. The new values are rounded to the stored type."""
        copy_into(self.model, {name: tensor.to(self.dtype).float() for name, tensor in tensors.items()})
        self._changed.update(tensors)

    def take_changed(self) -> list[str]:
        """The names of the tensors that `put` replaced since the last call."""
        changed = sorted(self._changed)
        self._changed.clear()
        return changed

    def affine_anchor(self, module: str) -> Affine:
        """The anchors of a linear's or norm's weight and bias, if it has a bias."""
        return Affine(self.anchor(f"{module}.weight"), self.anchor(f"{module}.bias") if self._biased(module) else None)

    def stacked_anchor(self, modules: Sequence[str]) -> Affine:
        """The anchors of linears that read the same input, stacked to one linear."""
        return Affine.stacked([self.affine_anchor(module) for module in modules])

    def affine_expert(self, task: str, module: str) -> Affine:
        """The expert's weight and bias, if the module has a bias."""
        bias = self.expert(task, f"{module}.bias") if self._biased(module) else None
        return Affine(self.expert(task, f"{module}.weight"), bias)

    def put_affine(self, module: str, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces a module's weight and bias, see `put`."""
        self.put({f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias}))

    def _biased(self, module: str) -> bool:
        return getattr(self.model.get_submodule(module), "bias", None) is not None
