"""Names and links that lead out of a folder: files outside it do not belong to it."""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def escapes(name: str) -> bool:
    """Whether a name, taken relative to a folder, leads out of it."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def leaves(path: Path, root: Path | None = None) -> bool:
    """Whether a link leads out of the file's folder, or out of `root` if that contains the folder.

    In the hub's cache, snapshots are folders of links to the `blobs` beside them; these count as inside.
    """
    folder, target = (root or path.parent).resolve(), path.resolve()
    inside = [folder]
    for parent in (folder, *folder.parents):
        if parent.parent.name == SNAPSHOTS:
            inside.append(parent.parent.parent / BLOBS)
    return not any(target.is_relative_to(place) for place in inside)
