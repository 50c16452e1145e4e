"""An architecture: how its models are opened, the names of their tensors, and the blocks that calibration visits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.data.batching import Batch
from epmq_cli.data.suite import Task
from epmq_cli.errors import ModelError
from epmq_cli.families.structure import Section, Stack
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.models.rotation import ValueHeads

Experts = Mapping[str, ModelFolder]


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """One architecture. Names of tensors and modules are those of the model that `load` returns.

    A new encoder is a row, see Encoder; anything else is a subclass with the five abstract methods.
    """

    name: str
    """The name for `suite.family`."""

    model_types: tuple[str, ...]
    """`model_type` in config.json of the models it takes, as base or expert."""

    added: tuple[str, ...] = ()
    """Prefixes of tensors that only some of its models have and that fine-tuning adds: `epmq merge` merges them where
    all models have them, `epmq run` needs them."""

    unsolved: tuple[str, ...] = ()
    """Patterns of the tensors that no step solves: the merged values are final."""

    repeated: tuple[str, ...] = ()
    """Modules that a block calls more than once; the first call reads the residual stream."""

    dequantize_on_load: bool = False
    """Whether transformers must dequantize while it loads. Otherwise it does so when the whole model is first called,
    which is too late for models that are used through other methods or that read their linears' weights."""

    mixes_formats: bool = True
    """Whether transformers loads its checkpoints with several number formats, which it cannot dequantize on load."""

    caches: bool = False
    """Whether its models generate text with a cache of keys and values."""

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """Opens a base (if `base` is None), or an expert of that base, in any form that epmq reads."""
        if base is None:
            return open_base(path, role)
        return open_expert(path, role, base, self.tensor_names(base).values(), self.spelling)

    def check_type(self, folder: ModelFolder) -> None:
        """Raises ModelError if the model type of a folder is not in `model_types`."""
        kind = folder.config.get("model_type")
        if kind not in self.model_types:
            *others, last = self.model_types
            types = f"{', '.join(others)} and {last}" if others else last
            raise ModelError(
                f"{folder.role}: {folder.path} holds a model of type {kind}, family {self.name} takes {types}"
            )

    def positions(self, folder: Path) -> int | None:
        """The number of tokens that the model in a folder can read; None without a limit."""
        return None

    @abstractmethod
    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The tensors of base or expert that are merged, including stored copies of tied tensors: name in the model ->
        name in the folder's files. ModelError where the folder holds another architecture."""

    def all_names(self, folder: ModelFolder) -> dict[str, str]:
        """The same for all stored tensors, including those that `epmq run` does not merge."""
        return {self.spelling(name): name for name in folder.infos}

    def spelling(self, stored: str) -> str:
        """The model's own name of a tensor that a class of transformers, or a file, stores under another name."""
        return stored

    def trained_beside(self, base: ModelFolder, experts: Experts, tasks: Sequence[Task]) -> list[str]:
        """Further tensors to merge, by stored name; reports trained tensors that are not merged."""
        return []

    @abstractmethod
    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """The settings that base and experts must share and that tensor shapes do not show, such as the number of
        heads."""

    def value_heads(self, folder: ModelFolder) -> ValueHeads | None:
        """What transform=hadamard rotates of an encoder; None for other models."""
        return None

    def further_files(self, path: Path) -> Mapping[str, Path]:
        """The files that the outputs of a model in this folder depend on, beside its own, by name."""
        return {}

    def save_beside(self, checkpoint: Path) -> None:  # noqa: B027 - most architectures need nothing
        """Writes what the folders of its models have beside the model and its processor into a checkpoint."""

    def folded(self, folder: ModelFolder) -> ModelFolder:
        """The model in the form that its steps describe: with the same outputs, and other tensors if need be."""
        return folder

    def is_folded(self, name: str) -> bool:
        """Whether a tensor is a factor that `folded` sets to 1."""
        return False

    @abstractmethod
    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The whole model as transformers loads it, or what its from_pretrained returns under `options`."""

    @abstractmethod
    def stacks(self, model: nn.Module) -> list[Stack]:
        """The stacks in the order of the forward pass. The linears of their blocks are quantized."""

    def blocks(self, model: nn.Module) -> list[Section]:
        """The blocks of all stacks in order."""
        return [block for stack in self.stacks(model) for block in stack.blocks]

    def readout(self, model: nn.Module) -> Section:
        """The readout of the last stack."""
        return self.stacks(model)[-1].readout

    @abstractmethod
    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The input of the heads: (rows, width), one row per sample, or one per token for families without heads."""
