"""Opens a model in whichever form it is given."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from epmq_cli.checkpoint.lora import Adapted
from epmq_cli.checkpoint.lora_base import warn_of_another_base
from epmq_cli.checkpoint.lora_config import CONFIG
from epmq_cli.checkpoint.lora_folder import adapters_inside, has_adapter, has_model, is_adapter_file, model_or_adapter
from epmq_cli.checkpoint.lora_names import Spelling
from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.checkpoint.state_dict import open_file
from epmq_cli.console import log
from epmq_cli.errors import ModelError

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


def check_read(expert: ModelFolder, base: ModelFolder, read: Collection[str], heads: Collection[str]) -> None:
    """ModelError where an adapter changes tensors that the base does not have and nothing reads; a warning where it
    changes tensors of the base that are not merged. `read`: the expert's tensors that are merged. `heads`: the modules
    of its head."""
    if not isinstance(expert.source, Adapted):
        return
    left = sorted(name for name in expert.source.changed - set(read) if not _is_inside(name, heads))
    unknown = [name for name in left if name not in base.infos]
    if unknown:
        raise ModelError(
            f"{expert.role}: the adapter {expert.path} holds {_listed(unknown)}, which the base ({base.path}) does not "
            "have and which cannot be merged; give the model that merge_and_unload of PEFT makes, or train the adapter "
            "without it"
        )
    if left:
        log.warning(
            "%s: the adapter %s changes %s, which are not merged: they stay the base's",
            expert.role,
            expert.path,
            _listed(left),
        )


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
