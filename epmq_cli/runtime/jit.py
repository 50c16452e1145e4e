"""Loops compiled to machine code by numba."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function, compiled at its first call. It releases the interpreter's lock, and numba caches it on disk.

    Without fast math, no operations are fused or reordered. Division by zero gives an infinity, as in torch.
    """
    try:
        kernel: Callable[..., None] = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder for the machine code can be written
        kernel = njit(nogil=True, error_model="numpy")(function)
    return kernel
