"""Opens the models of a suite and merges them tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.checkpoint.locate import locate
from epmq_cli.checkpoint.reader import Completed, ModelFolder
from epmq_cli.checkpoint.tokens import check_tokens
from epmq_cli.console import track
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.linalg import is_finite
from epmq_cli.merge.source import PIECE, Merge, MergeSource, Read
from epmq_cli.suites import Suite
from epmq_cli.threads import spread

ASIDE = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")


class Models:
    """The opened models of a suite, and their tensors side by side (`source`)."""

    def __init__(self, suite: Suite, family: Family) -> None:
        root = suite.root
        self.base = _open(family, suite.base, "base", root, None)
        base_names = family.tensor_names(self.base)
        self.experts = {
            task.name: _open(family, task.expert, f"expert of task {task.name}", root, self.base)
            for task in suite.members
        }
        names = {task: family.tensor_names(expert) for task, expert in self.experts.items()}
        if further := family.trained_beside(self.base, self.experts, suite.members):
            self.experts = {task: completed(expert, self.base, further) for task, expert in self.experts.items()}
            for known in (base_names, *names.values()):
                known.update({name: name for name in further})
        self.source = MergeSource(self.base, base_names, self.experts, names, suite.vocabulary)
        if family.reads == "texts":
            check_tokens(self.base, self.experts, {task.name: task.processor for task in suite.members})
        for expert in self.experts.values():
            if _described(expert) != _described(self.base):
                _check_settings(expert, family.settings(expert), self.base, family.settings(self.base))


def _described(folder: ModelFolder) -> dict[str, Any]:
    """The config but for what says nothing of the model. Where it is the same, so are all settings, and transformers,
    which knows their defaults but takes seconds to import, need not be asked."""
    return {name: value for name, value in folder.config.items() if name not in ASIDE}


def _check_settings(expert: ModelFolder, found: dict[str, Any], base: ModelFolder, expected: dict[str, Any]) -> None:
    for name, value in found.items():
        if value != expected[name]:
            raise ModelError(
                f"{expert.role} ({expert.path}) was not fine-tuned from the base ({base.path}): "
                f"{name} is {value} in its config and {expected[name]} in the base's"
            )


def _open(family: Family, source: str, role: str, root: str | None, base: ModelFolder | None) -> ModelFolder:
    """One model; `base` is None where it is the base that is opened."""
    path = locate(source, role, root)
    opened = family.open(path, role, base)
    if opened.config is not getattr(base, "config", None) and "quantization_config" in opened.config:
        raise ModelError(f"{role}: {path} is quantized already; give the model it was made from")
    return opened


def completed(expert: ModelFolder, base: ModelFolder, names: Collection[str]) -> ModelFolder:
    """An expert with the base's tensors in place of those of these names that it does not have."""
    return ModelFolder(expert.path, expert.role, expert.config, Completed(expert, base, names))


def fit_vocabulary(model: nn.Module, source: MergeSource) -> nn.Module:
    """The base model, with room for the largest vocabulary of the suite and the base's rows of `source` in it."""
    if source.vocabulary_size is not None:
        resized: Any = model
        resized.resize_token_embeddings(source.vocabulary_size, mean_resizing=False)
        own = model.state_dict()
        with torch.no_grad():
            for name in source.padded:
                own[name].copy_(source.base(name))
    return model


class Merged:
    """The merged model, each tensor made when it is asked for: in float32, rounded to `dtype`, in float32 again."""

    def __init__(self, source: MergeSource, merge: Merge, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self._rule = merge(source)

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        return self.stored(name, self.dtype).float()

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, rounded to a type, in that type."""
        shape = self.source.shape(name)
        found = torch.empty(prod(shape), dtype=dtype)

        def fill(part: tuple[Tensor, Read]) -> None:
            base, *experts = part[1]()
            part[0].copy_(self._rule(base, experts))

        spread(fill, zip(torch.split(found, PIECE), self.source.parts(name), strict=True))
        if not is_finite(found):
            kind = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"the merge of {name} does not fit into {kind}; choose another pack.dtype, such as bfloat16, or a "
                "smaller merge.scale"
            )
        return found.view(shape)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        return ((name, self.tensor(name)) for name in track(self.source.names, "merge"))
