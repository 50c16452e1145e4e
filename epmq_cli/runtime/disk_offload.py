"""Models whose weights are in files that the system reads and writes as it has memory for them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_cli.errors import ModelError


@dataclass(frozen=True)
class Disk:
    """A place for a model: files in this folder, the system's own for temporary ones where there is none."""

    folder: Path | None


LEAST = 1 << 20  # bytes that are worth a file


def on_disk(model: nn.Module, folder: Path | None) -> nn.Module:
    """The model in float32, its larger tensors in files of the folder (the system's own unless given) which nobody else
    sees and which go when the tensors do. ModelError where the disk has no room for them."""
    made: set[int] = set()

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.data_ptr() in made:  # tied tensors come twice
            return tensor
        found = _mapped(tensor, folder) if 4 * tensor.numel() >= LEAST else tensor.float()
        made.add(found.data_ptr())
        return found

    found: nn.Module = model._apply(moved)  # type: ignore[no-untyped-call]
    return found


def _mapped(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy of a tensor in a file; its room is taken first, since nobody could be told of a full disk later."""
    with tempfile.NamedTemporaryFile(prefix=".student-", dir=folder) as file:
        try:
            _take(file.fileno(), 4 * tensor.numel())
        except OSError as error:
            raise ModelError(
                f"{Path(file.name).parent} has no room for the model's weights ({error.strerror}); make room there, or "
                "use calib.student=memory"
            ) from error
        found = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=torch.float32)
    return found.view(tensor.shape).copy_(tensor)


def _take(file: int, size: int) -> None:
    """Gives a file its size; on macOS its room is taken only when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
