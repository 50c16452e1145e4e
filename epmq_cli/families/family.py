"""What the walker, the packer and the scorer need to know of a model architecture, and nothing else in epmq knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq_cli.data.batching import ALL, Batch, Collate
from epmq_cli.data.suite import Task
from epmq_cli.errors import ModelError
from epmq_cli.families.structure import Patches, Section, Stack, Table
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert, refuse_unread
from epmq_cli.models.pretrained import dequantized
from epmq_cli.models.processor_folder import Processor
from epmq_cli.models.wrappers import merged_names
from epmq_cli.quantize.linalg import is_finite
from epmq_cli.runtime.disk_offload import Disk, on_disk

Experts = Mapping[str, ModelFolder]
Head = Mapping[str, Tensor]
Predict = Callable[[nn.Module, Batch, Head], Tensor]
"""What a model says of each sample of a batch: a class or a number, (samples,)."""


class Family(ABC):
    """One architecture. Names of tensors and modules are those of the model that `load` returns.

    A new one is a module with a subclass that has the abstract methods, and `stacks`, or `blocks` and `readout` where
    there is one stack; and a line in `FAMILIES`."""

    model_types: tuple[str, ...]
    """`model_type` in config.json of the models it takes, as base or expert."""

    stem: tuple[Patches | Table, ...] = ()
    first_norm: str | None = None
    read_token: int | None = None
    """See Stack."""

    reads: Literal["texts", "pictures"] = "texts"
    """What the samples of its tasks are, and so whether a tokenizer or an image processor makes batches of them."""

    heads: Literal["own", "made", "none"]
    """Whether each task has a head of its own, trained with its expert, or one made by the base, or none."""

    head_parts: tuple[str, ...] = ()
    head_width = "hidden_size"
    """The tensors of a head, of which those in `bias` need not be there, and how a config calls what it reads."""

    added: tuple[str, ...] = ()
    """How the names of tensors begin that only some of an architecture's models have, and that fine-tuning adds: these
    are merged by `epmq merge` where all models have them, and needed by `epmq run`."""

    kept: tuple[str, ...] = ()
    """Patterns for the tensors that no step solves and that are right as merged."""

    repeated: tuple[str, ...] = ()
    """The modules of a block that it calls more than once; the first call reads the stream."""

    answers: bool = False
    """Whether experts add to the calibration batches of their tasks (`complete`)."""

    sample_types: tuple[type, ...] = (object,)
    """The types of the inputs that `collate` takes."""

    metrics: tuple[str, ...] = ("accuracy", "matthews")
    """What its tasks can be scored by; the first is the usual one."""

    dequantize_on_load: bool = False
    """Whether transformers must dequantize while it loads. Otherwise it does so when the whole model is first called,
    which is too late for models that are used through other methods, or whose modules read their linears' weights."""

    mixes_formats: bool = True
    """Whether transformers loads checkpoints with several number formats, which it cannot dequantize on load."""

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """A base (where `base` is None), or an expert of that base, in whatever form it is kept."""
        if base is None:
            return open_base(path, role)
        found = open_expert(path, role, base, self.tensor_names(base).values(), self.spelling)
        read = merged_names(found, self.tensor_names).values()  # none of an expert whose names a wrapper changed
        refuse_unread(found, base, read, self.in_head, tied=self.heads == "none")
        return found

    def check_type(self, folder: ModelFolder) -> None:
        """ModelError where a folder holds a model that is none of `model_types`."""
        found = folder.config.get("model_type")
        if found not in self.model_types:
            name, *others, last = type(self).__module__.rpartition(".")[2], *self.model_types
            known = f"{', '.join(others)} and {last}" if others else last
            raise ModelError(f"{folder.role}: {folder.path} holds a model of type {found}, family {name} takes {known}")

    def positions(self, folder: Path) -> int | None:
        """How many tokens of a task's `max_length` the model in a folder can read; None where nothing limits them."""
        return None

    def check_task(self, task: Task) -> None:  # noqa: B027 - most families need nothing
        """ConfigError where a task lacks what models of this family need of it."""

    @abstractmethod
    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The tensors of base or expert that are merged, stored copies of tied ones included: name in the model ->
        name in the folder's files. ModelError where the folder holds another architecture."""

    def all_names(self, folder: ModelFolder) -> dict[str, str]:
        """Likewise all stored tensors, those that `epmq run` does not merge included."""
        return {self.spelling(name): name for name in folder.infos}

    def spelling(self, stored: str) -> str:
        """The model's own name of a tensor that a class of transformers, or a file, calls so."""
        return stored

    def in_head(self, name: str) -> bool:
        """Whether a tensor of this name in the model belongs to a task's head."""
        return False

    def trained_beside(self, base: ModelFolder, experts: Experts, tasks: Sequence[Task]) -> list[str]:
        """Further tensors to merge, by stored name; says what experts have trained that is not merged."""
        return []

    @abstractmethod
    def settings(self, folder: ModelFolder) -> dict[str, Any]:
        """What base and experts must have in common and tensor shapes do not show, such as the number of heads."""

    @abstractmethod
    def load(self, folder: Path, **options: Any) -> nn.Module:
        """The whole model as transformers loads it, or what its from_pretrained makes of `options`."""

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The stacks in the order of the forward pass."""
        parts = self.stem, self.first_norm, self.read_token, self.token_mask
        return [Stack(self.blocks(model), self.readout(model), *parts)]

    def blocks(self, model: nn.Module) -> list[Section]:
        """The blocks in order. Their linears are what is quantized."""
        return [block for stack in self.stacks(model) for block in stack.blocks]

    def readout(self, model: nn.Module) -> Section:
        """What is behind the last block: `readout` of the last stack."""
        return self.stacks(model)[-1].readout

    @abstractmethod
    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Makes batches out of samples as the protocol of the task says. `folder` has the model's config and, unless
        `processor` says where it is, the tokenizer or image processor."""

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """A calibration batch with the answers of the task's expert, `model`, given so many samples at a time."""
        return batch

    def token_mask(self, batch: Batch) -> Tensor | None:
        """(samples, tokens) bool, True for the tokens that are real; None where all are."""
        return None

    @abstractmethod
    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the heads read: (rows, width), a row a sample, or a token for families without heads."""

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """The tensors of a task's own head. `model` is the base."""
        return {}

    def class_names(self, task: Task, expert: ModelFolder, base: ModelFolder, head: Head) -> tuple[str, ...] | None:
        """The names of the classes of a task's head, or of its answers, in order; None where they are not known."""
        return task.classes

    def head_inputs(self, features: Tensor, head: Head) -> Tensor:
        """What a head's weight is multiplied with: (samples, width)."""
        return features

    def logits(self, features: Tensor, head: Head) -> Tensor:
        """(samples, classes); the features themselves for families without heads."""
        return features

    def predict(self, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """How the samples of a task are judged; `folder` and `processor` as for `collate`. A head with a single output,
        as those of regressions have, gives a number, others the class of the largest logit."""

        def judged(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            logits = self.logits(self.features(model, batch), head)
            if not is_finite(logits):
                raise ModelError(f"what the model says on task {task.name} is a NaN or an infinity; check its weights")
            return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)

        return judged


class LanguageModel(Family):
    """A family that is calibrated on running text and scored by perplexity."""

    metrics = ("perplexity",)
    sample_types: tuple[type, ...] = (str,)

    @abstractmethod
    def tokens(self, folder: Path, documents: Sequence[str], processor: Processor | None = None) -> Tensor:
        """The token ids (tokens,) of running text, or of conversations; `folder` and `processor` as for `collate`."""

    @abstractmethod
    def token_logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits (samples, tokens, vocabulary) of the token behind each of `ids` (samples, tokens)."""


def load_model(
    family: Family, folder: Path, device: torch.device | Disk, dtype: torch.dtype | Literal["auto"] = "auto"
) -> nn.Module:
    """The model of a base folder or of a checkpoint, ready to score, on a device or in files: with weights of `dtype`
    (`auto`: as config.json says), packed ones dequantized in the stored type. It calculates in float32."""
    model = dequantized(folder, family.load, dtype)
    if isinstance(device, Disk):
        return on_disk(model, device.folder).eval().requires_grad_(False)
    found: nn.Module = nn.Module.to(model, device, torch.float32)  # transformers' own refuses what came quantized
    return found.eval().requires_grad_(False)
