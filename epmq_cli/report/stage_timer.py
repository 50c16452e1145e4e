"""Wall time and peak memory of each stage of a command."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from epmq_cli.runtime.memory import status
from epmq_cli.runtime.progress import finished

CLEAR_REFS = Path("/proc/self/clear_refs")


class Stages:
    """Measures the stages of a command; `records` goes into metrics.json."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # memory counters do not initialize CUDA themselves
        self._device = device
        self.records: dict[str, dict[str, Any]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Records the block's wall seconds and peak bytes (host; device if there is one) under the name."""
        _reset_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        record: dict[str, Any] = {
            "seconds": round(time.perf_counter() - start, 3),
            "peak_host_bytes": _peak_bytes(),
            "peak_device_bytes": None,
        }
        if self._device.type == "cuda":
            record["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._device)
        self.records[name] = record
        finished(name, record["seconds"], record["peak_host_bytes"])


def _reset_peak() -> None:
    """Resets Linux's peak counter; elsewhere peaks count from the start of the process."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    peak = status("VmHWM")
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
