"""Opens a model in whichever form it is given."""

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

SHOWN = 3  # tensors named in a message


def open_base(path: Path, role: str) -> ModelFolder:
    """The base, which must be a whole model folder."""
    if path.is_file():
        raise ModelError(f"{role}: {path} is a file; give the model folder that save_pretrained wrote")
    if (path / CONFIG).is_file() and not has_model(path):
        raise ModelError(f"{role}: {path} is an adapter ({CONFIG}); give the model that it was trained on")
    return ModelFolder(path, role)


def open_expert(
    path: Path, role: str, base: ModelFolder, merged: Collection[str], spelling: Spelling = str
) -> ModelFolder:
    """An expert: a model folder, a LoRA adapter of the base, or a state dict in one file; the last two have no config
    but the base's.

    `merged`: the stored names of the base's tensors that the family merges. `spelling`: the model's own name of a
    stored tensor.
    """
    if path.is_file() and not is_adapter_file(path):
        return ModelFolder(path, role, base.config, open_file(path, role))
    if path.is_dir() and not (path / CONFIG).is_file():
        inside = adapters_inside(path)
        if inside and not (path / "config.json").is_file():
            raise ModelError(f"{role}: {path} holds adapters in its folders; give one of them, {', '.join(inside)}")
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
    """ModelError where an adapter changes tensors that the base does not have and that are not read. `read`: the
    expert's tensors that are merged. `in_head`: whether a tensor belongs to its head. `tied`: whether the family's
    models have the output layers that the base may tie to a table."""
    adapted = expert.source
    if not isinstance(adapted, Adapted):
        return
    known = {*read, *base.infos, *(() if tied else adapted.tied)}
    unknown = sorted(name for name in adapted.changed - known if not in_head(name))
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ModelError(
            f"{expert.role}: the adapter {expert.path} holds {', '.join(unknown[:SHOWN])}{more}, which the base "
            f"({base.path}) does not have and which cannot be merged; train the adapter without it, or give an expert "
            "of the base's architecture"
        )
