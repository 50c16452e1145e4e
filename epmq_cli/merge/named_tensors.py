"""Views of tensors by name: those of a model folder, and those of one name in all experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from epmq_cli.models.headers import BITS
from epmq_cli.models.model_folder import ModelFolder, TensorInfo, dtype_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from epmq_cli.merge.source import MergeSource


@dataclass(frozen=True)
class ExpertTensors(Mapping[str, "Tensor"]):
    """The experts' tensors of one name, by task. A tensor is read each time it is looked up."""

    source: MergeSource
    name: str

    def __getitem__(self, task: str) -> Tensor:
        return self.source.expert(task, self.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.tasks)

    def __len__(self) -> int:
        return len(self.source.tasks)


@dataclass(frozen=True)
class OnDevice(Mapping[str, "Tensor"]):
    """The experts' tensors on a device, where each is copied when it is looked up."""

    experts: Mapping[str, Tensor]
    device: torch.device

    def __getitem__(self, task: str) -> Tensor:
        return self.experts[task].to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)


@dataclass(frozen=True)
class NamedTensors:
    """The tensors to merge of a model folder. `names` maps their common names to those in the files."""

    folder: ModelFolder
    names: Mapping[str, str]

    def info(self, name: str) -> TensorInfo:
        """The stored type and shape of a tensor."""
        return self.folder.infos[self.names[name]]

    def tensor(self, name: str) -> Tensor:
        """A tensor, as stored."""
        return self.folder.tensor(self.names[name])

    def main_dtype(self, names: Iterable[str]) -> torch.dtype:
        """The type of most elements of these tensors; of two types with as many elements, the wider one."""
        counts: Counter[str] = Counter()
        for info in map(self.info, names):
            counts[info.dtype] += prod(info.shape)
        return dtype_of(max(counts, key=lambda dtype: (counts[dtype], BITS[dtype])))
