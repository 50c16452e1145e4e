"""Folders that hold an adapter, a whole model, or both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch.linalg import vector_norm

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.adapter import PICKLE, WEIGHTS, Adapted
from epmq_cli.models.lora.base import warn_of_another_base
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.names import Spelling
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.runtime.console import say
from epmq_cli.store.safetensors_writer import INDEX, SINGLE

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NEAR = 0.1  # of what an adapter adds: how far a model may be from base and adapter and still be their sum


def has_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter's weights."""
    return any((path / name).is_file() for name in (WEIGHTS, PICKLE))


def has_model(path: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    if any((path / name).is_file() for name in (SINGLE, INDEX, *PICKLES)):
        return True
    return (path / "config.json").is_file() and any(file.name != WEIGHTS for file in path.glob("*.safetensors"))


def is_adapter_file(path: Path) -> bool:
    """Whether a file is an adapter's, with its config beside it."""
    return path.name in (WEIGHTS, PICKLE) and (path.parent / CONFIG).is_file()


def adapters_inside(path: Path) -> list[str]:
    """The folders in a folder that hold an adapter, as PEFT saves each adapter that has a name."""
    return sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}"))


def model_or_adapter(
    adapted: Adapted, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling
) -> ModelFolder:
    """What a folder with a whole model and an adapter stands for, where its tensors show it.

    transformers loads the model and adds the adapter to it. That is right where the adapter names this very folder as
    its base. Where the model is the base, the adapter is the expert; where it is the base with the adapter merged in,
    the model is. ModelError where it is neither.
    """
    path = adapted.path
    config = None if (path / "config.json").is_file() else base.config
    whole = ModelFolder(path, role, config)
    named = adapted.config.values.get("base_model_name_or_path")
    if isinstance(named, str) and named and Path(named).is_dir() and Path(named).resolve() == path.resolve():
        return ModelFolder(path, role, whole.config, Adapted(path, role, whole, merged, spelling))
    if _is_base(whole, base):  # first: what a small adapter adds may be less than a type rounds
        warn_of_another_base(adapted, role, base)
        return ModelFolder(path, role, base.config, adapted)
    if _is_merged(whole, adapted, base):
        say(f"{role}: the model in {path} has its adapter merged in already; the adapter is not added again")
        return whole
    raise ModelError(
        f"{role}: {path} holds a whole model and an adapter, and the model is neither the base nor the base with the "
        f"adapter merged in; give a folder with the model alone, or one with the adapter ({WEIGHTS}, {CONFIG}) alone"
    )


def _is_merged(whole: ModelFolder, adapted: Adapted, base: ModelFolder) -> bool:
    """Whether a model holds the base's tensors with the adapter merged in, as far as the adapter changes them."""
    names = sorted(adapted.changed & base.infos.keys())
    return bool(names) and all(_is_sum(whole, adapted, base, name) for name in names)


def _is_sum(whole: ModelFolder, adapted: Adapted, base: ModelFolder, name: str) -> bool:
    if name not in whole.infos or whole.infos[name].shape != adapted.infos[name].shape:
        return False
    expected = adapted.tensor(name).float()
    if base.infos[name].shape != expected.shape:
        return bool(torch.equal(whole.tensor(name).float(), expected))
    added = vector_norm(expected - base.tensor(name).float())
    stored = whole.tensor(name)
    rounded = torch.finfo(stored.dtype).eps / 2 * vector_norm(expected) if stored.is_floating_point() else 0.0
    return bool(vector_norm(stored.float() - expected) <= NEAR * added + rounded) and bool(added > 0)


def _is_base(whole: ModelFolder, base: ModelFolder) -> bool:
    """Whether a model holds the base's own tensors."""
    return whole.infos.keys() == base.infos.keys() and all(
        whole.infos[name].shape == base.infos[name].shape and torch.equal(whole.tensor(name), base.tensor(name))
        for name in base.infos
    )
