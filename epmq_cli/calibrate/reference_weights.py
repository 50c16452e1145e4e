"""The reference models of the student: base and experts, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into

if TYPE_CHECKING:
    from torch import Tensor, nn


class ReferenceWeights:
    """Tensors of base and experts under the student's names, in float32.

    `shared`: unmerged tensors, the same in all models. `merged`: returns the merged tensor of a name. `plain`: whether
    it replaces every expert's tensor (plain post-training quantization).
    """

    def __init__(
        self, source: MergeSource, shared: Mapping[str, Tensor], merged: Callable[[str], Tensor], plain: bool
    ) -> None:
        self._source, self._shared, self._merged, self._plain = source, shared, merged, plain

    def base(self, name: str) -> Tensor:
        """The base's tensor."""
        return self._shared[name] if name in self._shared else self._source.base(name)

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert."""
        if name in self._shared:
            return self._shared[name]
        return self._merged(name) if self._plain else self._source.expert(task, name)

    def restore(self, model: nn.Module) -> None:
        """Resets a student to the merged model."""
        copy_into(model, ((name, self._merged(name)) for name in self._source.names))
        copy_into(model, self._shared)

    def names(self, outside: tuple[str, ...] = ()) -> list[str]:
        """The merged tensors that are under none of these prefixes."""
        return [name for name in self._source.names if not name.startswith(outside)]
