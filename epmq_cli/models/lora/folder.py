"""Distinguishes folders with an adapter, a whole model, or both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.adapter import PICKLE, WEIGHTS, Adapted
from epmq_cli.models.lora.base import warn_of_another_base
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.names import Spelling
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.runtime.console import say
from epmq_cli.store.weight_files import INDEX, SINGLE

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NEAR = 0.1  # tolerance for a merged model, relative to the norm of the adapter's delta


def has_adapter(path: Path) -> bool:
    """Whether a folder contains an adapter's weights."""
    return any((path / name).is_file() for name in (WEIGHTS, PICKLE))


def has_model(path: Path) -> bool:
    """Whether a folder contains the weights of a whole model."""
    if any((path / name).is_file() for name in (SINGLE, INDEX, *PICKLES)):
        return True
    return (path / "config.json").is_file() and any(file.name != WEIGHTS for file in path.glob("*.safetensors"))


def is_adapter_file(path: Path) -> bool:
    """Whether a file contains an adapter and has its config beside it."""
    return path.name in (WEIGHTS, PICKLE) and (path.parent / CONFIG).is_file()


def adapters_inside(path: Path) -> list[str]:
    """The subfolders that contain an adapter. PEFT saves each named adapter to a subfolder."""
    return sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}"))


def model_or_adapter(
    adapted: Adapted, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling
) -> ModelFolder:
    """Decides from the tensors whether a folder with a whole model and an adapter means the model or the adapter.

    transformers loads the model and adds the adapter. epmq does the same if the adapter names this folder as its base.
    If the model is the base, the expert is the adapter. If the model is the base with the adapter merged in, the expert
    is the model. Otherwise raises ModelError.
    """
    path = adapted.path
    config = None if (path / "config.json").is_file() else base.config
    whole = ModelFolder(path, role, config)
    named = adapted.config.values.get("base_model_name_or_path")
    if isinstance(named, str) and named and Path(named).is_dir() and Path(named).resolve() == path.resolve():
        return ModelFolder(path, role, whole.config, Adapted(path, role, whole, merged, spelling))
    if _is_base(whole, base):  # check first: the delta of a small adapter can be below the rounding error
        warn_of_another_base(adapted, role, base)
        return ModelFolder(path, role, base.config, adapted)
    if _is_merged(whole, adapted, base):
        say(f"{role}: the model in {path} already contains the adapter; epmq does not add it again")
        return whole
    raise ModelError(
        f"{role}: {path} contains a whole model and an adapter, but the model is neither the base nor the base with "
        f"the adapter merged in; give a folder with only the model, or one with only the adapter ({WEIGHTS}, {CONFIG})"
    )


def _is_merged(whole: ModelFolder, adapted: Adapted, base: ModelFolder) -> bool:
    """Whether all tensors that the adapter changes equal the base's with the adapter merged in."""
    names = sorted(adapted.changed & base.infos.keys())
    return bool(names) and all(_is_sum(whole, adapted, base, name) for name in names)


def _is_sum(whole: ModelFolder, adapted: Adapted, base: ModelFolder, name: str) -> bool:
    if name not in whole.infos or whole.infos[name].shape != adapted.infos[name].shape:
        return False
    expected = adapted.tensor(name).float()
    if base.infos[name].shape != expected.shape:
        return bool(torch.equal(whole.tensor(name).float(), expected))
    added = torch.linalg.vector_norm(expected - base.tensor(name).float())
    stored = whole.tensor(name)
    rounded = (
        torch.finfo(stored.dtype).eps / 2 * torch.linalg.vector_norm(expected) if stored.is_floating_point() else 0.0
    )
    return bool(torch.linalg.vector_norm(stored.float() - expected) <= NEAR * added + rounded) and bool(added > 0)


def _is_base(whole: ModelFolder, base: ModelFolder) -> bool:
    """Whether a model has the same tensors as the base."""
    return whole.infos.keys() == base.infos.keys() and all(
        whole.infos[name].shape == base.infos[name].shape and torch.equal(whole.tensor(name), base.tensor(name))
        for name in base.infos
    )
