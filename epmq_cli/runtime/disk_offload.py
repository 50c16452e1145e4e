"""Models whose weights are memory-mapped files: the system writes them back when memory runs short."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Disk:
    """Keep a model's weights in files of this folder, or of the system's temporary folder if it is None."""

    folder: Path | None


LEAST = 1 << 20  # bytes; smaller tensors stay in memory


def on_disk(model: nn.Module, folder: Path | None) -> nn.Module:
    """The model in float32, with its larger tensors in unnamed files of the folder (by default the system's temporary
    one), which vanish with the tensors. ModelError if the disk is full."""
    addresses: set[int] = set()

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.data_ptr() in addresses:  # tied tensors occur twice
            return tensor
        copy = _mapped(tensor, folder) if 4 * tensor.numel() >= LEAST else tensor.float()
        addresses.add(copy.data_ptr())
        return copy

    offloaded: nn.Module = model._apply(move)  # type: ignore[no-untyped-call]
    return offloaded


def _mapped(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy of a tensor in a file. Its space is allocated first: a mapped write to a full disk kills the process."""
    with tempfile.NamedTemporaryFile(prefix=".student-", dir=folder) as file:
        try:
            _take(file.fileno(), 4 * tensor.numel())
        except OSError as error:
            raise ModelError(
                f"{Path(file.name).parent} has no space for the model's weights ({error.strerror}); free some space "
                "there, or use calib.student=memory"
            ) from error
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=torch.float32)
    return mapped.view(tensor.shape).copy_(tensor)


def _take(file: int, size: int) -> None:
    """Sets a file's size and allocates its space; on macOS the space is allocated when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
