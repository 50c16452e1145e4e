"""Reads the headers and the config of a model on the hub, without its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.headers import READ, TensorInfo
from epmq_cli.models.resolve import local_path
from epmq_cli.models.stored import infos_as_linears


def on_this_machine(source: str, role: str, root: str | None = None) -> Path | re.Match[str]:
    """The folder or file of a model, also in the hub's own cache, or else the parts of its hub id; see `locate`.
    Downloads nothing but pretrained models of open_clip."""
    found = local_path(source, role, root)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                found["repo"], revision=found["revision"], allow_patterns=list(READ), local_files_only=True
            )
        )
    except (OSError, ValueError):  # not in the cache, or no id
        return found
    path = folder / (found["inside"] or "")
    return path if path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))) else found


def hub_headers(repo: str, revision: str | None, role: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config.json of a repository, or {} without one, and the header entries of its safetensors files.

    Asks the hub for the first bytes of each file. Raises ModelError if the hub does not answer, or if the repository
    has no safetensors files.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = get_safetensors_metadata(repo, revision=revision).files_metadata
        try:
            path = hf_hub_download(repo, "config.json", revision=revision)
            config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            config = {}
    except Exception as error:  # the network can fail in every library below, and a repository can contain anything
        known = isinstance(error, (HfHubHTTPError, HFValidationError, OSError, ValueError))
        reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"{role}: {repo} is not on this machine, and its headers cannot be read from the hub ({reason}); check the "
            "name and the network, or give a local folder"
        ) from error
    infos = {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype))
        for file in files.values()
        for name, tensor in file.tensors.items()
    }
    return config, infos_as_linears(config, infos)
