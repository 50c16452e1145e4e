"""Loops in machine code, by numba."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function in machine code, which leaves other threads running and is kept on disk; made when first called.

    No fast math, so that no two operations are fused or reordered; what is divided by zero is infinite, as in torch.
    """
    try:
        found: Callable[..., None] = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to keep the machine code
        found = njit(nogil=True, error_model="numpy")(function)
    return found
