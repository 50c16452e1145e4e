"""The experts' tensors of the section that a walk is in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.families.structure import Section
from epmq_cli.models.weights import copy_into

if TYPE_CHECKING:
    from torch import Tensor, nn


class TeacherBlocks:
    """Copies experts' sections into a teacher. The tensors of as many tasks as fit into the store's budget are kept
    until `release`; those of others are read each time."""

    def __init__(self, reference: ReferenceWeights, store: ActivationStore) -> None:
        self._reference, self._store = reference, store
        self._kept: dict[str, dict[str, Tensor]] = {}

    def load(self, section: Section, teacher: nn.Module, task: str, only: Collection[str] | None = None) -> None:
        """Copies a task's expert into the teacher, a module like the section's. `only`: the modules to copy, by the
        section's own names; None for all."""
        own = teacher.state_dict()
        if task not in self._kept and only is None and self._store.hold(_bytes(own)):
            self._kept[task] = {name: tensor.to(own[name].device) for name, tensor in self._read(section, own, task)}
        wanted = [name for name in own if only is None or name.rpartition(".")[0] in only]
        kept = self._kept.get(task)
        copy_into(teacher, self._read(section, wanted, task) if kept is None else {name: kept[name] for name in wanted})

    def release(self) -> None:
        """Drops all tensors, at the end of a section."""
        self._store.release(sum(map(_bytes, self._kept.values())))
        self._kept.clear()

    def _read(self, section: Section, names: Collection[str], task: str) -> Iterator[tuple[str, Tensor]]:
        """The expert's tensors, one after the other."""
        return ((name, self._reference.expert(task, section.name(name))) for name in names)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
