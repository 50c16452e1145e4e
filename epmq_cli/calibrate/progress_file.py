"""Files of tensors with a JSON header, in which an unfinished run stores its results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from epmq_cli.errors import RunError
from epmq_cli.store.atomic import atomic_file
from epmq_cli.store.safetensors_writer import of, write_file

if TYPE_CHECKING:
    from torch import Tensor

HEADER = "epmq"
SUFFIX = ".safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """Writes a safetensors file with tensors by name and a JSON header, atomically. RunError if the disk refuses it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            write_file(partial, (of(name, tensor) for name, tensor in tensors.items()), {HEADER: json.dumps(header)})
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> RunError:
    """The error for a file of progress that cannot be written."""
    return RunError(
        f"{path} cannot be written ({error.strerror or error}); free some space there and start the same command again "
        "to continue after the last finished block"
    )


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open safetensors file, memory-mapped, and its header. RunError if the file is damaged, including errors that
    only reading its tensors shows."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _header(file)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); start from the beginning with resume=never") from error


def _header(file: Any) -> Any:
    header = (file.metadata() or {}).get(HEADER)
    if header is None:
        raise ValueError("epmq did not write it")
    return json.loads(header)
