"""Applies a merge method tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.merge.core_space import CoreSource
from epmq_cli.merge.method import ElementwiseRule, MergeData, MergeMethod, PieceReader
from epmq_cli.merge.named_tensors import OnDevice
from epmq_cli.merge.parameters import Parameters
from epmq_cli.merge.post import post_processors
from epmq_cli.merge.source import PIECE, MergeSource
from epmq_cli.quantize.linalg import is_finite
from epmq_cli.runtime.progress import track
from epmq_cli.runtime.threads import spread

if TYPE_CHECKING:
    from torch import Tensor

CPU = "cpu"


class LazyMerge:
    """The merged model, computed tensor by tensor on access: merged in float32, rounded to `dtype`, returned in
    float32.

    `data`: calibration data for methods that need it. `device`: where rules that gain from an accelerator compute.
    """

    def __init__(
        self,
        source: MergeSource,
        method: MergeMethod,
        dtype: torch.dtype,
        data: MergeData | None = None,
        device: torch.device | str = CPU,
    ) -> None:
        self.source, self.dtype, self._device = source, dtype, torch.device(device)
        entries, space = (method.post, method.space) if isinstance(method, Parameters) else ((), "full")
        self._core = CoreSource(source) if space == "core" else None
        self._read = source if self._core is None else self._core
        self._rule = method.fit(self._read, data)
        self._posts = [post.fit(self._read) for post in post_processors("merge.post", entries)]

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self.stored(name, self.dtype).float()

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, rounded to a type, in that type."""
        tensor = self._merged(name, dtype if self._core is None and not self._posts else torch.float32)
        for post in self._posts:
            base, experts = self._inputs(name, post.on_device)
            tensor = post.apply(name, base, experts, tensor.view(base.shape).to(base.device)).cpu()
        if self._core is not None:
            tensor = self._core.full(name, tensor)
        tensor = tensor.to(dtype)
        if not is_finite(tensor):
            kind = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"the merge of {name} does not fit into {kind}; choose another pack.dtype, such as bfloat16, or a "
                "smaller merge.scale"
            )
        return tensor.view(self.source.shape(name))

    def _merged(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name before post-processing, in a type."""
        if isinstance(self._rule, ElementwiseRule):
            return self._by_pieces(self._rule, name, dtype)
        return self._rule.merge(name, *self._inputs(name, self._rule.on_device)).to("cpu", dtype)

    def _inputs(self, name: str, on_device: bool) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The base's tensor and the experts', which are read on access."""
        base, experts = self._read.base(name), self._read.experts(name)
        if not on_device or self._device.type == CPU:
            return base, experts
        return base.to(self._device), OnDevice(experts, self._device)

    def _by_pieces(self, rule: ElementwiseRule, name: str, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(prod(self._read.shape(name)), dtype=dtype)

        def fill(part: tuple[Tensor, PieceReader]) -> None:
            elements, reader = part
            elements.copy_(rule.merge(reader()))

        spread(fill, zip(torch.split(tensor, PIECE), self._read.pieces(name), strict=True))
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        return ((name, self.tensor(name)) for name in track(self.source.names, "merge"))
