"""From what a suite calls a model to the folder or file that holds it.

shipped:tiny/base            inside this package
open_clip:ViT-B-32/openai    by one of open_clip's own names (open_clip/registry.py)
models/base, experts/a.pt    on disk: a folder, or one file (.safetensors, .pt, .pth, .bin)
owner/name                   of the hub, or of its mirror where the suite has a root
owner/name@revision          likewise: a branch, tag or commit; in a mirror the folder of that very name
owner/name:path/in/it        likewise: a folder or a file inside
"""

from __future__ import annotations

import re
from pathlib import Path

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.model_folder import READ
from epmq_cli.models.open_clip.registry import SCHEME, locate_open_clip
from epmq_cli.runtime.links import escapes
from epmq_cli.runtime.paths import expanded

SHIPPED = Path(__file__).parent.parent / "shipped"
SHIPPED_SCHEME = "shipped:"
HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<inside>\w(?:[\w.-]|/(?!\.\.))*))?"
)
FILES = (".safetensors", ".pt", ".pth", ".bin")


def locate(source: str, role: str, root: str | None = None) -> Path:
    """The folder or file of a model.

    What is on disk under this name comes first, then `root`, a mirror with the layout `<root>/<owner>/<name>`, then
    the hub, from where it is downloaded once into the hub's own cache (nothing is fetched under HF_HUB_OFFLINE=1).
    `role` names the model in errors, such as "base" or "expert of task sst2".
    """
    if source.startswith(SHIPPED_SCHEME):
        name = source.removeprefix(SHIPPED_SCHEME)
        folder = SHIPPED / name
        if escapes(name) or not folder.is_dir():
            raise ModelError(f"{role}: nothing called {source} is shipped with epmq")
        return folder
    if source.startswith(SCHEME):
        return locate_open_clip(source, role, root)
    path = expanded(source, role)
    if path.is_dir() or (path.is_file() and path.suffix in FILES):
        return path
    found = HUB_ID.fullmatch(source)
    if found is None or escapes(source.replace(":", "/")) or path.exists() or Path(found["repo"]).suffix in FILES:
        raise ModelError(
            f"{role}: {source} is not a folder or file ({', '.join(FILES)}) that is there; "
            "give one, or an id of the hub (owner/name, owner/name@revision, owner/name:path/in/it)"
        )
    mirrored = _in_mirror(expanded(root, "suite.root"), source, found) if root else None
    return mirrored or _download(found["repo"], found["revision"], found["inside"], role, root)


def _in_mirror(root: Path, source: str, found: re.Match[str]) -> Path | None:
    path = root / source.partition(":")[0] / (found["inside"] or "")
    return path if path.exists() else None


def _download(repo: str, revision: str | None, inside: str | None, role: str, root: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(READ)  # the pickles that some repositories also have only where they are named
    if inside:  # a file, and the configs beside it; or a folder
        file = inside.endswith(FILES)
        patterns = [inside, str(Path(inside).parent / "*.json")] if file else [f"{inside}/{p}" for p in READ]
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns)) / (inside or "")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        places = f"here nor under {root}" if root else "here"
        raise ModelError(
            f"{role}: {repo} is neither a folder {places} nor can it be had from the hub; "
            f"check the name and the network ({reason})"
        ) from error
    if not path.exists():
        raise ModelError(f"{role}: {repo} has no {inside}; check the path behind the colon")
    return path
