"""Opens a model in whichever form it is given."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from epmq_cli.checkpoint.lora import CONFIG, Adapted, is_adapter
from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.checkpoint.state_dict import open_file
from epmq_cli.errors import ModelError


def open_base(path: Path, role: str) -> ModelFolder:
    """The base, which must be a whole model folder."""
    if path.is_file():
        raise ModelError(f"{role}: {path} is a file; give the model folder that save_pretrained wrote")
    if is_adapter(path):
        raise ModelError(f"{role}: {path} is an adapter ({CONFIG}); give the model that it was trained on")
    return ModelFolder(path, role)


def open_expert(path: Path, role: str, base: ModelFolder, merged: Collection[str]) -> ModelFolder:
    """An expert: a model folder, a LoRA adapter of the base, or a state dict in one file; the last two have no config
    but the base's.

    `merged`: the stored names of the base's tensors that the family merges.
    """
    if path.is_file():
        return ModelFolder(path, role, base.config, open_file(path, role))
    if is_adapter(path):
        return ModelFolder(path, role, base.config, Adapted(path, role, base, merged))
    return ModelFolder(path, role)
