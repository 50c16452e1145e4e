"""manifest.json: size and sha256 of every file of a checkpoint folder and its sub-folders, by the path in the folder,
written when all of them are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from epmq_cli.errors import CheckpointError
from epmq_cli.runtime.links import leaves
from epmq_cli.runtime.paths import read_regular
from epmq_cli.store.hashing import Content, contents

MANIFEST = "manifest.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, known: Mapping[str, Content]) -> None:
    """Lists every file of the folder; nothing in it depends on time or place. `known`: what some of them were written
    with, which need not be read again."""
    there = files_within(folder)
    read = contents([path for name, path in there.items() if name not in known])
    files = {name: asdict(known[name] if name in known else read[path]) for name, path in there.items()}
    text = json.dumps({"algorithm": "sha256", "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def file_problems(folder: Path) -> list[str]:
    """Where a folder is not what its manifest says, a phrase for each file; CheckpointError where it has no manifest
    that epmq can have written.

    Files and folders whose names begin with a dot are not counted: hubs and file managers add such.
    """
    listed, there = _listed(folder), files_within(folder)
    found = [f"{name} is missing" for name in listed if name not in there]
    found += [f"{name} is not listed in {MANIFEST}" for name in there if name not in listed]
    links = {name for name, path in {**there, MANIFEST: folder / MANIFEST}.items() if leaves(path, folder)}
    found += [f"{name} is a link out of the folder" for name in links]
    regular = {name for name, path in there.items() if path.is_file()}  # opening a pipe would block
    found += [f"{name} is no regular file" for name in listed if name in there and name not in regular]
    same_size = {}
    for name in listed.keys() & regular:
        size = there[name].stat().st_size
        if size == listed[name].size:
            same_size[name] = there[name]
        else:
            found.append(f"{name} has {size} bytes instead of {listed[name].size}")
    read = contents([path for name, path in same_size.items() if name not in links])
    found += [
        f"{name} has other bytes" for name, path in same_size.items() if read.get(path, listed[name]) != listed[name]
    ]
    return sorted(found)


def files_within(folder: Path) -> dict[str, Path]:
    """All files of a folder and its sub-folders but the manifest, in the order of their paths in it; a link to a folder
    counts as a file."""
    found = dict(_walked(folder))
    found.pop(MANIFEST, None)
    return found


def _walked(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{name}", inner) for name, inner in _walked(path))
        else:
            yield path.name, path


def _listed(folder: Path) -> dict[str, Content]:
    try:
        files = json.loads(read_regular(folder / MANIFEST))["files"]
        listed = {name: Content(**entry) for name, entry in files.items()}
        sound = all(_sound(name, content) for name, content in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST}; give the checkpoint folder that epmq run or merge wrote"
        ) from error
    if not sound:
        raise CheckpointError(f"{folder / MANIFEST} lists what is no file of that folder; fetch the checkpoint again")
    return listed


def _sound(name: str, content: Content) -> bool:
    """Whether an entry is one that epmq can have written; names lead nowhere else."""
    parts = name.split("/")
    plain = all(part and Path(part).name == part and not part.startswith(".") for part in parts)
    return (
        plain and name.isprintable() and isinstance(content.size, int) and SHA256.fullmatch(content.sha256) is not None
    )
