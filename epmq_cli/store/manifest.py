"""manifest.json: the size and sha256 of every file in a checkpoint folder and its sub-folders, by relative path.

It is written last. It detects corruption, not tampering: whoever changes a file can change the manifest too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from epmq_cli.errors import CheckpointError
from epmq_cli.runtime.paths import leaves, read_regular
from epmq_cli.store.atomic import write_bytes, write_text
from epmq_cli.store.hashing import Content, content, contents

MANIFEST = "manifest.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, hashed: Mapping[str, Content]) -> None:
    """Writes the manifest of a folder; it does not depend on time or place. `hashed`: the contents of files whose
    hashes are known already."""
    present = files_within(folder)
    rest = contents([path for name, path in present.items() if name not in hashed])
    files = {name: asdict(hashed[name] if name in hashed else rest[path]) for name, path in present.items()}
    (folder / MANIFEST).write_text(_manifest(files), encoding="utf-8")


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files of a folder, new or not, and then their entries in the manifest."""
    listed = _listed(folder)
    for name, data in files.items():
        write_bytes(folder / name, data)
        listed[name] = content(folder / name)
    entries = {name: asdict(listed[name]) for name in sorted(listed, key=lambda name: name.split("/"))}
    write_text(folder / MANIFEST, _manifest(entries))


def _manifest(files: Mapping[str, Mapping[str, object]]) -> str:
    return json.dumps({"algorithm": "sha256", "files": files}, indent=2) + "\n"


def file_problems(folder: Path) -> list[str]:
    """A phrase for each file of a folder that differs from the manifest; CheckpointError if the manifest is
    missing or epmq did not write it.

    Files and folders whose names begin with a dot are ignored, because hubs and file managers add some.
    """
    listed, present = _listed(folder), files_within(folder)
    problems = [f"{name} is missing" for name in listed if name not in present]
    problems += [f"{name} is not listed in {MANIFEST}" for name in present if name not in listed]
    links = {name for name, path in {**present, MANIFEST: folder / MANIFEST}.items() if leaves(path, folder)}
    problems += [f"{name} is a link that leads out of the folder" for name in links]
    regular = {name for name, path in present.items() if path.is_file()}  # opening a pipe would block
    problems += [f"{name} is not a regular file" for name in listed if name in present and name not in regular]
    same_size = {}
    for name in listed.keys() & regular:
        size = present[name].stat().st_size
        if size == listed[name].size:
            same_size[name] = present[name]
        else:
            problems.append(f"{name} has {size} bytes instead of {listed[name].size}")
    actual = contents([path for name, path in same_size.items() if name not in links])
    problems += [
        f"{name} has another sha256"
        for name, path in same_size.items()
        if actual.get(path, listed[name]) != listed[name]
    ]
    return sorted(problems)


def files_within(folder: Path) -> dict[str, Path]:
    """All files of a folder and its sub-folders except the manifest, sorted by relative path; a link to a folder counts
    as a file."""
    files = dict(_relative_paths(folder))
    files.pop(MANIFEST, None)
    return files


def _relative_paths(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{name}", inner) for name, inner in _relative_paths(path))
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
        raise CheckpointError(
            f"{folder / MANIFEST} lists names that are not files of that folder; fetch the checkpoint again"
        )
    return listed


def _sound(name: str, content: Content) -> bool:
    """Whether epmq can have written an entry; its name must not lead out of the folder."""
    parts = name.split("/")
    plain = all(part and Path(part).name == part and not part.startswith(".") for part in parts)
    return (
        plain and name.isprintable() and isinstance(content.size, int) and SHA256.fullmatch(content.sha256) is not None
    )
