"""Task adapters: turn samples into batches, and model outputs into predictions, for any architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from epmq_cli.data.batching import ALL, Batch, Collate
from epmq_cli.data.samples import Samples
from epmq_cli.data.suite import Task
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_folder import Processor
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Features = Callable[["nn.Module", Batch], "Tensor"]
Head = Mapping[str, "Tensor"]
Predict = Callable[["nn.Module", Batch, Head], "Tensor"]
"""The prediction for each sample of a batch: a class or a number, (samples,), or the tokens of a text, (samples,
tokens)."""
Decode = Callable[["Tensor"], list[str]]
"""The texts of predictions that are tokens."""


class TaskAdapter(ABC):
    """Tasks of one kind, for any architecture that gives the features they need. The defaults suit tasks without
    heads."""

    reads: ClassVar[Literal["texts", "pictures", "sounds"]] = "texts"
    """The kind of the samples: a tokenizer turns texts into batches, an image processor pictures, a feature extractor
    sounds."""

    pipeline: ClassVar[str | None] = None
    """The kind of task in the words of the hub (`pipeline_tag`), if it has a word for it."""

    heads: ClassVar[Literal["own", "made", "none"]] = "none"
    """Whether each task has a head trained with its expert, one that the base makes, or none."""

    vocabulary: ClassVar[bool] = False
    """Whether models end in logits of the tokens of their vocabulary."""

    numbers: ClassVar[bool] = False
    """Whether outputs are numbers, such as embeddings, and not logits of classes."""

    head_parts: tuple[str, ...] = ()
    """The tensors of a head; biases are optional."""

    head_linear: str | None = None
    """The module of experts that gives the logits; without it a model has no head of a task."""

    head_width: ClassVar[str] = "hidden_size"
    """The setting of the config that gives the number of features."""

    head_widths: int = 1
    """How many times that width the features have."""

    answers: ClassVar[bool] = False
    """Whether experts add to the calibration batches of their tasks (`complete`)."""

    consumed: ClassVar[tuple[str, ...]] = ()
    """The tensors of a drawn batch that only `complete` reads."""

    sample_types: ClassVar[tuple[type, ...]] = (object,)
    """The types of samples that `collate` takes."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "matthews")
    """The metrics that tasks can be scored by, the usual one first."""

    def in_head(self, name: str) -> bool:
        """Whether a tensor of this name in the model belongs to a task's head."""
        return False

    def check_task(self, task: Task) -> None:  # noqa: B027 - most kinds need nothing
        """Raises ConfigError if a task lacks a setting that its kind needs."""

    @abstractmethod
    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Returns the function that makes a batch of samples. `folder` has the model's config and, unless `processor`
        gives another place, the tokenizer or image processor."""

    def scoring(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """The function that makes a batch of test samples; `folder` and `processor` as for `collate`."""
        return self.collate(folder, task, processor)

    def worded(self, task: Task, samples: Samples) -> Samples:
        """Test samples as the model reads them, such as with prompts."""
        return samples

    def calibrating(self, task: Task, samples: Samples, count: int) -> Samples:
        """At most `count` samples that calibration reads, from as many drawn ones."""
        return samples

    def complete(self, model: nn.Module, batch: Batch, samples: int = ALL) -> Batch:
        """A calibration batch with the answers of the task's expert, `model`, run on `samples` samples at a time."""
        return batch

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """The tensors of a task's own head. `model` is the base."""
        return {}

    def class_names(self, task: Task, expert: ModelFolder, base: ModelFolder, head: Head) -> tuple[str, ...] | None:
        """The names of the classes of a task's head, or of its answers, in order; None if they are unknown."""
        return task.classes

    def head_inputs(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """The inputs (samples, width) of the head's linear."""
        return features

    def logits(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """(samples, classes); the features themselves for tasks without heads."""
        return features

    def predict(self, features: Features, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Returns the function that predicts; `folder` and `processor` as for `collate`. A head with one output, such
        as that of a regression, gives a number, others give the class of the largest logit."""

        def predict(model: nn.Module, batch: Batch, head: Head) -> Tensor:
            logits = self.logits(model, features(model, batch), head)
            if not is_finite(logits):
                raise ModelError(f"the logits on task {task.name} contain NaN or infinity; check the model's weights")
            return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)

        return predict

    def decode(self, folder: Path, task: Task, processor: Processor | None = None) -> Decode | None:
        """Returns the function that turns predictions into texts; None where they are classes or numbers."""
        return None
