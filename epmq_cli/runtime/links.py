"""Names and links that lead out of a folder: what is outside of it is no part of it."""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def escapes(name: str) -> bool:
    """Whether a name leads out of the folder that it is looked for in."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def leaves(path: Path, root: Path | None = None) -> bool:
    """Whether a file leads out of its folder, or out of `root`, which that folder is in, by a link.

    The snapshots of the hub's cache consist of links to the `blobs` beside them, which count as inside.
    """
    folder, target = (root or path.parent).resolve(), path.resolve()
    inside = [folder]
    for parent in (folder, *folder.parents):
        if parent.parent.name == SNAPSHOTS:
            inside.append(parent.parent.parent / BLOBS)
    return not any(target.is_relative_to(place) for place in inside)
