"""Resolves a model name in a suite to a local folder or file.

shipped:tiny/base            inside this package
open_clip:ViT-B-32/openai    a pretrained model of open_clip (open_clip/registry.py)
models/base, experts/a.pt    on disk: a folder, or one file (.safetensors, .pt, .pth, .bin)
owner/name                   on the hub, or in a mirror if the suite has a root
owner/name@revision          a branch, tag or commit; a mirror has a folder of exactly this name
owner/name:path/in/it        a folder or a file inside the repository
"""

from __future__ import annotations

import re
from pathlib import Path

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.headers import READ
from epmq_cli.models.open_clip.config import SCHEME
from epmq_cli.runtime.paths import escapes, expanded

SHIPPED = Path(__file__).parent.parent / "shipped"
SHIPPED_SCHEME = "shipped:"
HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<inside>\w(?:[\w.-]|/(?!\.\.))*))?"
)
CARD = "README.md"
"""It may name the licence."""
FILES = (".safetensors", ".pt", ".pth", ".bin")


def locate(source: str, role: str, root: str | None = None) -> Path:
    """Returns the folder or file of a model.

    A local path takes precedence. Next comes `root`, a mirror with the layout `<root>/<owner>/<name>`. Last comes the
    hub, which downloads the model once to its own cache. With HF_HUB_OFFLINE=1, nothing is downloaded. `role`: the name
    of the model in error messages, such as "base" or "expert of task sst2".
    """
    found = local_path(source, role, root)
    if isinstance(found, Path):
        return found
    return _download(found["repo"], found["revision"], found["inside"], role, root)


def local_path(source: str, role: str, root: str | None = None) -> Path | re.Match[str]:
    """Returns the folder or file of a model on this machine, or else the parts of its hub id; see `locate`.

    A pretrained model of open_clip is downloaded.
    """
    if source.startswith(SHIPPED_SCHEME):
        name = source.removeprefix(SHIPPED_SCHEME)
        folder = SHIPPED / name
        if escapes(name) or not folder.is_dir():
            raise ModelError(f"{role}: {source} is not shipped with epmq; check the name")
        return folder
    if source.startswith(SCHEME):
        from epmq_cli.models.open_clip.registry import locate_open_clip  # imports torch

        return locate_open_clip(source, role, root)
    path = expanded(source, role)
    if path.is_dir() or (path.is_file() and path.suffix in FILES):
        return path
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None or escapes(source.replace(":", "/")) or path.exists() or Path(hub_id["repo"]).suffix in FILES:
        raise ModelError(
            f"{role}: {source} is neither an existing folder or file ({', '.join(FILES)}) nor a hub id (owner/name, "
            "owner/name@revision, owner/name:path/in/it); check the path"
        )
    mirrored = _in_mirror(expanded(root, "suite.root"), source, hub_id) if root else None
    return mirrored or hub_id


def _in_mirror(root: Path, source: str, hub_id: re.Match[str]) -> Path | None:
    path = root / source.partition(":")[0] / (hub_id["inside"] or "")
    return path if path.exists() else None


def _download(repo: str, revision: str | None, inside: str | None, role: str, root: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*READ, CARD]  # without pickles, which are downloaded only if the suite names them
    if inside:  # a file with the configs beside it, or a folder
        file = inside.endswith(FILES)
        patterns = [inside, str(Path(inside).parent / "*.json")] if file else [f"{inside}/{p}" for p in READ]
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns)) / (inside or "")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        places = f"locally or under {root}" if root else "locally"
        raise ModelError(
            f"{role}: {repo} was not found {places} and cannot be downloaded from the hub ({reason}); "
            "check the name and the network"
        ) from error
    if not path.exists():
        raise ModelError(f"{role}: {repo} has no {inside}; check the path after the colon")
    return path
