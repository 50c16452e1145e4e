"""Classification by heads that are trained with their experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.suite import POSITION, Task
from epmq_cli.families.heads import classifier
from epmq_cli.families.heads.classifier import ClassifierHead
from epmq_cli.families.processors import images, tokens
from epmq_cli.families.tasks.adapter import Head, TaskAdapter
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_folder import Processor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Classifier(TaskAdapter):
    """Tasks with one head each, made of these modules of the expert."""

    heads = "own"
    metrics = ("accuracy", "matthews", "spearman")

    def __init__(self, modules: ClassifierHead, head_widths: int = 1) -> None:
        self.modules, self.head_widths = modules, head_widths
        self.head_parts, self.head_linear = modules.parts, modules.linear
        self.in_head = modules.contains  # type: ignore[method-assign]

    def head(self, model: nn.Module, base: Path, task: Task, expert: ModelFolder, device: torch.device) -> Head:
        """`weight` (classes, width) and `bias` (classes,) of the expert's classifier, and the tensors of the layers in
        front of it."""
        config: Any = model.config
        width = self.head_widths * config.hidden_size
        return {name: tensor.to(device) for name, tensor in self.modules.read(expert, width).items()}

    def class_names(self, task: Task, expert: ModelFolder, base: ModelFolder, head: Head) -> tuple[str, ...] | None:
        """The names in the expert's config. None for a LoRA adapter, which has the base's config."""
        if expert.config is base.config or task.match_labels == POSITION:
            return None
        return classifier.read_names(expert, len(head["weight"]))

    def head_inputs(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """The outputs (samples, inner width) of the layers in front of the linear."""
        return self.modules.inputs(model, features, head)

    def logits(self, model: nn.Module, features: Tensor, head: Head) -> Tensor:
        """(samples, classes) from the linear."""
        return classifier.logits(self.head_inputs(model, features, head), head)


class TextClassifier(Classifier):
    """Classification of texts, or of pairs of texts."""

    sample_types = (str, tuple)
    pipeline = "text-classification"

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Pads texts, or pairs of texts, to the longest of the batch, and cuts them at `max_length` tokens."""
        tokenizer = tokens(folder, processor=processor)

        def collate(texts: list[Any]) -> Batch:
            return dict(tokenizer(texts, padding=True, truncation=True, max_length=task.max_length))

        return collate


class ImageClassifier(Classifier):
    """Classification of images."""

    reads = "pictures"
    pipeline = "image-classification"
    sample_types = (Image,)

    def collate(self, folder: Path, task: Task, processor: Processor | None = None) -> Collate:
        """Passes images through the image processor, as RGB."""
        return images(folder, processor)
