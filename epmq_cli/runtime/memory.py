"""The C library's own allocator, told how this program uses memory, and how much the system says that is."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 1 << 25  # bytes, the most that glibc takes: what is larger, such as moments, leaves no holes behind
KEPT = 1 << 26  # bytes
STATUS = Path("/proc/self/status")


def keep_freed() -> None:
    """Keeps what is freed for the tensors to come, where the C library is glibc.

    As it stands, every large tensor is a mapping of its own whose pages the system zeroes at the first touch, batch
    after batch: a sixth of the time of a walk.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Hands what is free back to the system, where the C library is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def status(field: str) -> int | None:
    """Bytes that the system gives for this field of the process's status; None where it does not say."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def taken() -> int:
    """Bytes that the process has from the system and that no file stands for; 0 where the system does not say."""
    return status("RssAnon") or 0
