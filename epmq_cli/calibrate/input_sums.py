"""Sums over the inputs of linears in whole forward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from epmq_cli.calibrate.moments import Products, real_tokens, tokens_of
from epmq_cli.data.batching import size
from epmq_cli.data.microbatch import joined
from epmq_cli.errors import ModelError
from epmq_cli.families.structure import Linears, Section
from epmq_cli.merge.method import Group
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor, nn

Part = TypeVar("Part")
"""What a forward pass takes: a batch, or a hidden state."""


def merged_groups(section: Section, merged: Collection[str]) -> Iterator[tuple[Group, Linears]]:
    """The linears of a section that are merged, by their names in the model, grouped by their inputs, and their steps.
    `merged`: the names of the merged tensors."""
    for step in section.steps:
        if isinstance(step, Linears):
            if step.route is not None:
                raise ModelError(
                    f"base: {section.name(step.names[0])} is in a mixture of experts, whose inputs merge methods do "
                    "not measure; use a merge method that needs no inputs of linears, such as merge=ties"
                )
            names = (section.name(name) for name in step.names)
            if group := tuple(name for name in names if f"{name}.weight" in merged):
                yield group, step


class InputSums(Generic[Part]):
    """Sums of x x' over the inputs x of linears. `masks`: of the real tokens, by linear.

    The rows of a whole batch are multiplied at once, regardless of the micro-batch size, so that smaller micro-batches
    give the same bytes.
    """

    def __init__(self, masks: Mapping[str, Callable[[Part], Tensor | None]]) -> None:
        self._masks = masks
        self._products, self._tokens = {name: Products(distributed) for name in masks}, dict.fromkeys(masks, 0)

    def add(
        self,
        model: nn.Module,
        forward: Callable[[Part], object],
        parts: Sequence[Part],
        chosen: Tensor | None = None,
    ) -> None:
        """Adds the inputs from the forward passes of the parts of a batch. `chosen`: which samples (samples,) of the
        batch are in the sums; None for all."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self._masks}
        seen = dict.fromkeys(self._masks, 0)  # samples

        def take(name: str, inputs: Tensor) -> None:
            part = parts[len(rows[name])]
            mask = self._masks[name](part)
            own = real_tokens(inputs, mask)
            self._tokens[name] += len(own)
            if chosen is not None:
                count = size(part) if isinstance(part, dict) else len(part.hidden)  # type: ignore[attr-defined]
                members = chosen[seen[name] : seen[name] + count].to(inputs.device)
                own = own[tokens_of(members, mask, len(own))]
                seen[name] += count
            rows[name].append(own if len(parts) == 1 else own.clone())  # a hidden state may be offloaded meanwhile
            if len(rows[name]) == len(parts):
                self._products[name].add_square(joined(rows.pop(name)))

        for part in parts:
            with first_inputs(model, self._masks, take):
                forward(part)

    def means(self) -> dict[str, Tensor]:
        """The sums (in, in) over the tokens of all processes, by linear, divided by the number of all tokens, also of
        samples that are not in the sums; call it once."""
        return {name: self._mean(name) for name in self._masks}

    def _mean(self, name: str) -> Tensor:
        rows = self._products.pop(name).square_rows()
        tokens = distributed.all_reduce(torch.tensor(self._tokens[name], dtype=torch.float64))
        return distributed.all_gather_rows(rows, rows.shape[1]) / float(tokens)


@contextmanager
def first_inputs(model: nn.Module, names: Collection[str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the context, passes the name and input of each module's first call to `add`. Later calls, such as those of
    DeBERTa's keys for positions, do not count."""
    waiting = set(names)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in waiting:
                waiting.discard(name)
                add(name, args[0])

        return take

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
