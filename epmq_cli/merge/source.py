"""What every merge method reads: base and experts side by side, by tensor name, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from epmq_cli.checkpoint.reader import DTYPES, ModelFolder, TensorInfo
from epmq_cli.errors import ModelError

SHOWN = 3  # differences named in an error

Rule = Callable[[Tensor, list[Tensor]], Tensor]
"""One merged tensor from the base's and the experts' (float32, all of one shape, never changed in place)."""


class Merge(Protocol):
    """A merge method: reads what it needs of the whole models, then gives the rule for each tensor."""

    def __call__(self, source: MergeSource) -> Rule:
        """The rule that makes one merged tensor."""


class MergeSource:
    """Base and experts of one suite under common tensor names.

    `base_names` and `expert_names[task]` map the common name of every tensor to be merged to the name it is stored
    under. ModelError before anything is computed: names or shapes that differ from the base's.
    """

    def __init__(
        self,
        base: ModelFolder,
        base_names: dict[str, str],
        experts: dict[str, ModelFolder],
        expert_names: dict[str, dict[str, str]],
    ) -> None:
        self._base = base
        self._base_names = base_names
        self._experts = experts
        self._expert_names = expert_names
        for task in experts:
            self._check_same(task)
        self.names = [name for name, stored in base_names.items() if base.infos[stored].dtype in DTYPES]

    def base(self, name: str) -> Tensor:
        """The base's tensor in float32; ModelError where it holds a NaN or an infinity."""
        return _finite(self._base, name, self._base_names[name])

    def expert(self, task: str, name: str) -> Tensor:
        """The tensor of a task's expert in float32; ModelError where it holds a NaN or an infinity."""
        return _finite(self._experts[task], name, self._expert_names[task][name])

    def experts(self, name: str) -> list[Tensor]:
        """The tensors of all experts in float32, in the order of the tasks."""
        return [self.expert(task, name) for task in self._experts]

    def task_vectors(self, task: str) -> Iterator[Tensor]:
        """Expert minus base in float32, tensor by tensor in the order of `names`."""
        for name in self.names:
            yield self.expert(task, name) - self.base(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type that the base stores a tensor in."""
        return DTYPES[self._base.infos[self._base_names[name]].dtype]

    @property
    def tasks(self) -> list[str]:
        """The tasks that have an expert, in the suite's order."""
        return list(self._experts)

    def _check_same(self, task: str) -> None:
        base = {name: self._base.infos[stored] for name, stored in self._base_names.items()}
        infos = self._experts[task].infos
        expert = {name: infos[stored] for name, stored in self._expert_names[task].items()}
        differences = _differences(base, expert)
        if differences:
            more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise ModelError(
                f"expert of task {task} ({self._experts[task].path}) was not fine-tuned from "
                f"the base ({self._base.path}): {'; '.join(differences[:SHOWN])}{more}"
            )


def _finite(folder: ModelFolder, name: str, stored: str) -> Tensor:
    tensor = folder.tensor(stored).float()
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{folder.role}: {name} holds a NaN or an infinity; train or fetch the model again")
    return tensor


def _differences(base: dict[str, TensorInfo], expert: dict[str, TensorInfo]) -> list[str]:
    """What differs, a phrase each, in the order of the base's tensors."""
    found = []
    for name, info in base.items():
        if name not in expert:
            found.append(f"{name} is missing from the expert")
        elif expert[name].shape != info.shape:
            found.append(f"{name} is {list(expert[name].shape)} in the expert and {list(info.shape)} in the base")
    found += [f"{name} is missing from the base" for name in expert if name not in base]
    return found
