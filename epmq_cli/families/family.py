"""A family: an architecture and a task adapter. The rest of epmq uses the family only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from epmq_cli.data.suite import Task
from epmq_cli.families.architecture import Architecture
from epmq_cli.families.structure import Linears, Table
from epmq_cli.families.tasks.adapter import Predict, TaskAdapter
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import refuse_unread
from epmq_cli.models.pretrained import dequantized
from epmq_cli.models.processor_folder import Processor
from epmq_cli.models.wrappers import merged_names
from epmq_cli.runtime.disk_offload import Disk, on_disk

if TYPE_CHECKING:
    from torch import nn


class Family:
    """An architecture and a task adapter under one interface; only `open` and `predict` combine the two."""

    def __init__(self, architecture: Architecture, tasks: TaskAdapter) -> None:
        self.architecture, self.tasks = architecture, tasks
        self.name = architecture.name
        self.model_types = architecture.model_types
        self.added = architecture.added
        self.unsolved = architecture.unsolved
        self.repeated = architecture.repeated
        self.dequantize_on_load = architecture.dequantize_on_load
        self.mixes_formats = architecture.mixes_formats
        self.caches = architecture.caches
        self.positions = architecture.positions
        self.tensor_names = architecture.tensor_names
        self.all_names = architecture.all_names
        self.spelling = architecture.spelling
        self.trained_beside = architecture.trained_beside
        self.settings = architecture.settings
        self.value_heads = architecture.value_heads
        self.further_files = architecture.further_files
        self.save_beside = architecture.save_beside
        self.folded = architecture.folded
        self.is_folded = architecture.is_folded
        self.load = architecture.load
        self.stacks = architecture.stacks
        self.blocks = architecture.blocks
        self.readout = architecture.readout
        self.features = architecture.features
        self.reads = tasks.reads
        self.heads = tasks.heads
        self.vocabulary = tasks.vocabulary
        self.numbers = tasks.numbers
        self.head_parts = tasks.head_parts
        self.head_linear = tasks.head_linear
        self.head_width = tasks.head_width
        self.head_widths = tasks.head_widths
        self.answers = tasks.answers
        self.sample_types = tasks.sample_types
        self.metrics = tasks.metrics
        self.in_head = tasks.in_head
        self.check_task = tasks.check_task
        self.collate = tasks.collate
        self.complete = tasks.complete
        self.head = tasks.head
        self.class_names = tasks.class_names
        self.head_inputs = tasks.head_inputs
        self.logits = tasks.logits
        self.decode = tasks.decode

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """Opens a base (if `base` is None), or an expert of that base, in any form that epmq reads."""
        opened = self.architecture.open(path, role, base)
        if base is not None:
            names = merged_names(opened, self.tensor_names).values()  # empty if a wrapper changed the expert's names
            refuse_unread(opened, base, names, self.in_head, tied=self.vocabulary)
        return opened

    def predict(self, folder: Path, task: Task, processor: Processor | None = None) -> Predict:
        """Returns the function that predicts the samples of a task; see TaskAdapter.predict."""
        return self.tasks.predict(self.features, folder, task, processor)


def load_model(
    family: Family,
    folder: Path,
    device: torch.device | Disk,
    dtype: torch.dtype | Literal["auto"] = "auto",
    described: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model of a base folder or of a checkpoint, ready to score, on a device or in files: with weights of `dtype`
    (`auto`: the one in config.json), packed ones dequantized in the stored type. It computes in float32. `described`: a
    config in place of the folder's, see `dequantized`."""
    model = dequantized(folder, family.load, dtype, described)
    if isinstance(device, Disk):
        return on_disk(model, device.folder).eval().requires_grad_(False)

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    # transformers' `to` rejects quantized models, and torch's makes real numbers of complex ones
    loaded: nn.Module = torch.nn.Module._apply(model, converted)  # type: ignore[no-untyped-call]
    return loaded.eval().requires_grad_(False)


def linear_shapes(model: nn.Module, family: Family) -> Iterator[tuple[str, torch.Size]]:
    """The names and shapes of the linears that will be quantized."""
    for block in family.blocks(model):
        for name in block.linears:
            yield block.name(name), block.module.get_parameter(f"{name}.weight").shape


def outside_blocks(model: nn.Module, family: Family) -> list[nn.Embedding | nn.Linear]:
    """The embeddings in front of the blocks, every module of a shared one, and the linears outside of blocks and
    readouts, such as output layers. They are read by calls alone, so their weights may be elsewhere between calls."""
    stacks = family.stacks(model)
    inside = {id(module) for stack in stacks for section in stack.sections for module in section.module.modules()}
    tables = [part.name for stack in stacks for part in stack.stem if isinstance(part, Table)]
    weights = {id(model.get_parameter(f"{name}.weight")) for name in tables}
    return [
        module
        for module in model.modules()
        if (isinstance(module, torch.nn.Embedding) and id(module.weight) in weights)
        or (isinstance(module, torch.nn.Linear) and id(module) not in inside)
    ]


def linear_groups(model: nn.Module, family: Family) -> dict[str, str]:
    """Maps each linear that will be quantized to the first linear of those that read the same input, such as queries,
    keys and values. Engines multiply with these as one."""
    return {
        block.name(name): block.name(step.names[0])
        for block in family.blocks(model)
        for step in block.steps
        if isinstance(step, Linears)
        for name in step.names
    }
