"""Opens a base or an expert in any supported form."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.lora.base import warn_of_another_base
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.folder import adapters_inside, has_adapter, has_model, is_adapter_file, model_or_adapter
from epmq_cli.models.lora.names import Spelling
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.state_dict import open_file
from epmq_cli.models.stored import as_linears

SHOWN = 3  # tensors per message


def open_base(path: Path, role: str) -> ModelFolder:
    """Opens the base, which must be a complete model folder."""
    if path.is_file():
        raise ModelError(f"{role}: {path} is a file; give the model folder that save_pretrained wrote")
    if (path / CONFIG).is_file() and not has_model(path):
        raise ModelError(f"{role}: {path} is an adapter ({CONFIG}); give the model that the adapter was trained on")
    return ModelFolder(path, role)


def open_expert(
    path: Path, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling = str
) -> ModelFolder:
    """Opens an expert: a model folder, a LoRA adapter of the base, or a state dict in one file.

    Adapters and state dicts use the base's config. `merged`: the stored names of the base tensors that the family
    merges. `spelling`: maps a stored name to the model's own name.
    """
    if path.is_file() and not is_adapter_file(path):
        return ModelFolder(path, role, base.config, as_linears(base.config, open_file(path, role)))
    if path.is_dir() and not (path / CONFIG).is_file():
        inside = adapters_inside(path)
        if inside and not (path / "config.json").is_file():
            raise ModelError(f"{role}: {path} contains adapters in subfolders; give one of them: {', '.join(inside)}")
        return ModelFolder(path, role)
    if path.is_dir() and has_model(path) and not has_adapter(path):
        return ModelFolder(path, role, None if (path / "config.json").is_file() else base.config)
    adapted = Adapted(path, role, base, merged, spelling)
    if path.is_dir() and has_model(path):
        return model_or_adapter(adapted, role, base, merged, spelling)
    warn_of_another_base(adapted, role, base)
    return ModelFolder(path, role, base.config, adapted)


def refuse_unread(
    expert: ModelFolder, base: ModelFolder, read: Collection[str], in_head: Callable[[str], bool], tied: bool
) -> None:
    """Raises ModelError if an adapter changes tensors that neither the merge reads nor the base has.

    `read`: the expert's tensors that the merge reads. `in_head`: whether a tensor belongs to the expert's head. `tied`:
    whether the family's models have the output layer that the base may tie to the embedding table.
    """
    adapted = expert.source
    if not isinstance(adapted, Adapted):
        return
    names = {*read, *base.infos, *(() if tied else adapted.tied)}
    unknown = sorted(name for name in adapted.changed - names if not in_head(name))
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ModelError(
            f"{expert.role}: the adapter {expert.path} contains {', '.join(unknown[:SHOWN])}{more}, which the base "
            f"({base.path}) does not have; train the adapter without these tensors, or give an expert of the base's "
            "architecture"
        )
