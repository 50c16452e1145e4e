"""From what a suite calls a model to the folder that holds it."""

from __future__ import annotations

from pathlib import Path

from epmq_cli.errors import ModelError

SHIPPED = Path(__file__).parent.parent / "shipped"
SHIPPED_SCHEME = "shipped:"


def locate(source: str, role: str) -> Path:
    """The folder of a model: `shipped:<name>` inside this package, a folder on disk, or else a model id of the hub.

    A hub id is downloaded once into the hub's own cache (safetensors, configs and tokenizer files only; nothing is
    fetched under HF_HUB_OFFLINE=1). `role` names the model in errors, such as "base" or "expert of task sst2".
    """
    if source.startswith(SHIPPED_SCHEME):
        folder = SHIPPED / source.removeprefix(SHIPPED_SCHEME)
        if not folder.is_dir():
            raise ModelError(f"{role}: nothing called {source} is shipped with epmq")
        return folder
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or folder.exists():
        raise ModelError(f"{role}: {source} is not a folder; give a model folder or an id of the hub (owner/name)")
    return _download(source, role)


def _download(repo: str, role: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{role}: {repo} is neither a folder here nor can it be had from the hub; "
            f"check the name and the network ({reason})"
        ) from error
