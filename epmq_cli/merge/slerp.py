"""SLERP: interpolates on the arc between two models (Shoemake 1985, https://doi.org/10.1145/325334.325242), and
NuSLERP, which does so with weights, by rows or columns, or between task vectors (mergekit,
https://github.com/arcee-ai/mergekit).

The angle is that between the directions of two tensors, and its sines are factors on the tensors themselves, as in
mergekit, so that both directions and lengths are interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from epmq_cli.merge.gram import cosines, gram, row_grams
from epmq_cli.merge.method import MergeData, Need, TensorRule
from epmq_cli.merge.parameters import Parameters, PerTensor, Weight
from epmq_cli.merge.settings import Setting, TensorSetting
from epmq_cli.merge.source import MergeSource

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995  # of the cosine: from here on SLERP is linear
COLLINEAR = 1e-16  # of the squared sine: the same for NuSLERP


def ends(base: Tensor, experts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two ends of an interpolation: both experts, or the base and the only expert."""
    tensors = [experts[task] for task in experts]
    return (tensors[0], tensors[1]) if len(tensors) == 2 else (base, tensors[0])


def on_the_arc(t: float, first: Tensor, second: Tensor, cosine: Tensor, linear: Tensor) -> Tensor:
    """The tensors at `t` between two tensors at an angle, for each `cosine`: the tensors' shape, or a column of one for
    each row. Where `linear`, on the line between them."""
    angle = torch.where(linear, torch.pi / 2, cosine.acos())  # an angle whose sine is not 0, where it is not used
    one = torch.where(linear, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    other = torch.where(linear, t, (t * angle).sin() / angle.sin())
    return one.float() * first + other.float() * second


def cosine_of(first: Tensor, second: Tensor) -> Tensor:
    """() in float64: the cosine of the angle between two tensors, read as vectors; 0 if one is zero."""
    products = gram([first, second])
    return cosines(products[0, 1], (products[0, 0] * products[1, 1]).sqrt())


def slerp(name: str, base: Tensor, experts: Mapping[str, Tensor], t: TensorSetting) -> Tensor:
    """The tensor at `t` between the two ends."""
    first, second = ends(base, experts)
    cosine = cosine_of(first, second)
    return on_the_arc(t.at(name), first, second, cosine, cosine.abs() > PARALLEL)


@dataclass(frozen=True)
class Slerp(Parameters):
    """`merge=slerp`.

    `t`: the place between the two ends, a setting: 0 is the first one, 1 the second. The ends are the two experts; with
    one expert the base is the first end.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = False
    experts: ClassVar[tuple[int, int | None]] = (1, 2)

    t: Annotated[Setting, PerTensor(0, 1)]

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of both ends."""
        return TensorRule(partial(slerp, t=source.setting(self.t, 0.5)))


def spherical(first: Tensor, second: Tensor, t: float, flatten: bool, row_wise: bool) -> Tensor:
    """The tensor at `t` between two tensors: `flatten` reads them as vectors; otherwise each vector along the last
    dimension, or with `row_wise` along the first one, is interpolated for itself."""
    if flatten or first.ndim < 2:
        cosine = cosine_of(first, second)
        return on_the_arc(t, first, second, cosine, 1 - cosine.square() <= COLLINEAR)
    turned = [tensor.transpose(0, -1) if row_wise else tensor for tensor in (first, second)]
    shape = turned[0].shape
    one, other = (tensor.reshape(-1, shape[-1]) for tensor in turned)
    products = row_grams([one, other])
    lengths = (products[:, 0, 0] * products[:, 1, 1]).sqrt()
    cosine = cosines(products[:, 0, 1], lengths)[:, None]
    merged = on_the_arc(t, one, other, cosine, 1 - cosine.square() <= COLLINEAR).view(shape)
    return merged.transpose(0, -1).contiguous() if row_wise else merged


@dataclass(frozen=True)
class Nuslerp(Parameters):
    """`merge=nuslerp`.

    `weights`: those of the two experts, a setting; the place between them is the second one's share, and the middle if
    both are 0. `nuslerp_flatten`: reads tensors as vectors; otherwise interpolates each vector along the last
    dimension, or with `nuslerp_row_wise` along the first one. `task_vectors`: interpolates the task vectors, as
    mergekit does if it is given a base, and not the experts.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    core: ClassVar[bool | str] = "task_vectors"
    experts: ClassVar[tuple[int, int | None]] = (2, 2)

    weights: Annotated[Setting, Weight()]
    nuslerp_flatten: bool
    nuslerp_row_wise: bool
    task_vectors: bool

    def fit(self, source: MergeSource, data: MergeData | None) -> TensorRule:
        """Returns the rule; reads no model. The rule holds one tensor of both experts."""
        weights = source.setting(self.weights, 1.0)

        def merge(name: str, base: Tensor, experts: Mapping[str, Tensor]) -> Tensor:
            own = [weights.at(name, task) for task in experts]
            t = own[1] / sum(own) if sum(own) else 0.5
            first, second = ends(base, experts)
            if not self.task_vectors:
                return spherical(first, second, t, self.nuslerp_flatten, self.nuslerp_row_wise)
            vectors = first - base, second - base
            return base + spherical(*vectors, t, self.nuslerp_flatten, self.nuslerp_row_wise)

        return TensorRule(merge)
