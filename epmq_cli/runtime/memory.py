"""Settings of the C library's allocator, and the memory that the process uses."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 1 << 25  # bytes, the maximum that glibc accepts; larger blocks, such as moments, do not fragment the heap
KEPT = 1 << 26  # bytes
STATUS = Path("/proc/self/status")


def keep_freed() -> None:
    """Keeps freed memory for later tensors, if the C library is glibc.

    By default, glibc maps every large tensor separately, and the system zeroes its pages at the first access, batch
    after batch: one sixth of a walk's time.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Returns free memory to the system, if the C library is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def status(field: str) -> int | None:
    """The bytes in a field of the process's status; None if the system does not report it."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def taken() -> int:
    """The resident bytes of the process that no file backs; 0 if the system does not report them."""
    return status("RssAnon") or 0
