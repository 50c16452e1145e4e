"""Walks through a model that is merged section by section: the inputs of a section come from the merged sections in
front of it, and the activations inside it from each expert's own section."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING

from epmq_cli.calibrate.activations.hidden_state import HiddenState, enter, handed
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.input_sums import InputSums, merged_groups
from epmq_cli.data.batching import Batch, Batches, size
from epmq_cli.data.held_out import Subset, members
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Section, Stack
from epmq_cli.merge.method import MergeGroups
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class SectionWalk:
    """One walk. `merge` replaces the linears of the model, whose other tensors must be merged already.

    `parts`: the parts of each batch that run through the model at a time, by task.
    """

    model: nn.Module
    family: Family
    source: MergeSource
    merge: MergeGroups
    store: ActivationStore
    parts: Mapping[str, Sequence[Sequence[Batch]]]
    streams: dict[str, list[HiddenState]] = field(default_factory=dict)

    @cached_property
    def merged_names(self) -> frozenset[str]:
        """The names of the merged tensors."""
        return frozenset(self.source.names)

    def run(self) -> dict[str, Tensor]:
        """The merged tensors, by name."""
        merged: dict[str, Tensor] = {}
        own: Batches = {task: [part for batch in group for part in batch] for task, group in self.parts.items()}
        for stack in self.family.stacks(self.model):
            values: list[int] = []
            for task in own:
                self.streams[task] = enter(self.model, self.family, stack, own[task], self.store, values)
            for section in stack.sections:
                merged |= self._section(stack, section)
            if stack.handed is not None:
                own = handed(stack.handed, own, self.streams)
        return merged

    def _section(self, stack: Stack, section: Section) -> dict[str, Tensor]:
        """Merges the linears of a section, and runs every batch through the result."""
        steps = {name: step for group, step in merged_groups(section, self.merged_names) for name in group}
        merged: dict[str, Tensor] = {}
        if steps:
            expert = copy.deepcopy(section.module)

            def moments(task: str, linears: Sequence[str], subset: Subset = "all") -> dict[str, Tensor]:
                self._load(section, expert, task)
                return self._moments(section, expert, task, {name: steps[name] for name in linears}, subset)

            merged = self.merge([group for group, _ in merged_groups(section, self.merged_names)], moments)
            copy_into(self.model, merged)
        for streams in self.streams.values():
            for stream in streams:
                with stream.loaded():
                    stream.finish(section.module)
        return merged

    def _load(self, section: Section, expert: nn.Module, task: str) -> None:
        """Copies the merged tensors of a task's expert into a copy of the section."""
        names = {local: section.name(local) for local in expert.state_dict()}
        own = ((local, name) for local, name in names.items() if name in self.merged_names)
        copy_into(expert, ((local, self.source.expert(task, name)) for local, name in own))

    def _moments(
        self, section: Section, expert: nn.Module, task: str, steps: Mapping[str, Linears], subset: Subset
    ) -> dict[str, Tensor]:
        """E[x x'] of the inputs of linears in an expert's section, by name. `steps`: of these linears."""
        local = {name: own for own, _ in expert.named_modules() if (name := section.name(own)) in steps}
        sums = InputSums({local[name]: partial(_mask, step.memory) for name, step in steps.items()})
        streams, batches = iter(self.streams[task]), self.parts[task]
        for batch, chosen in zip(batches, members(subset, [sum(map(size, batch)) for batch in batches]), strict=True):
            sums.add(expert, partial(_run, expert), [*islice(streams, len(batch))], chosen)
        means = sums.means()
        return {name: means[local[name]] for name in steps}


def _mask(memory: bool, stream: HiddenState) -> Tensor | None:
    """The real tokens of a linear's input. `memory`: whether it reads the output of another stack."""
    return stream.memory if memory else stream.mask


def _run(module: nn.Module, stream: HiddenState) -> None:
    """Runs a hidden state through a section, and leaves it as it is."""
    with stream.loaded():
        replace(stream, forward_pass=None, handle=None).finish(module)
