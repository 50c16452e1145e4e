"""Opens the models of a suite and merges them tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from epmq_cli.checkpoint.locate import locate
from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.merge.source import Merge, MergeSource
from epmq_cli.suites import Suite


class Models:
    """The opened folders of a suite, and their tensors side by side (`source`)."""

    def __init__(self, suite: Suite, family: Family) -> None:
        self.base = _open(suite.base, "base")
        self.experts = {task.name: _open(task.expert, f"expert of task {task.name}") for task in suite.members}
        names = {task: family.tensor_names(expert) for task, expert in self.experts.items()}
        self.source = MergeSource(self.base, family.tensor_names(self.base), self.experts, names)
        expected = family.settings(self.base)
        for expert in self.experts.values():
            for name, value in family.settings(expert).items():
                if value != expected[name]:
                    raise ModelError(
                        f"{expert.role} ({expert.path}) was not fine-tuned from the base ({self.base.path}): "
                        f"{name} is {value} in its config and {expected[name]} in the base's"
                    )


def _open(source: str, role: str) -> ModelFolder:
    folder = ModelFolder(locate(source, role), role)
    if "quantization_config" in folder.config:
        raise ModelError(f"{role}: {folder.path} is quantized already; give the model it was made from")
    return folder


def merge_models(source: MergeSource, merge: Merge, dtype: torch.dtype) -> dict[str, Tensor]:
    """The merged tensors, computed in float32, rounded to `dtype` and given back in float32."""
    rule = merge(source)
    return {
        name: rule(source.base(name), source.experts(name)).to(dtype).float() for name in track(source.names, "merge")
    }
