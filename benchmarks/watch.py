"""Measures the anonymous memory of a command: pages that no file backs, which the system cannot reclaim."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

EVERY = 0.02  # seconds


@dataclass(frozen=True)
class Watched:
    """The measurements of a command.

    `wall` is in seconds. `peak` is the highest anonymous memory (RssAnon) of all its processes together, in bytes;
    `resident` also counts the files that they map (VmRSS). `status` is the exit status.
    """

    wall: float
    peak: int
    resident: int
    status: int


def watched(
    command: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[bytes] | int = subprocess.DEVNULL
) -> Watched:
    """Runs a command to its end and samples its memory and that of its children fifty times a second."""
    start, peaks, done = time.perf_counter(), [0, 0], threading.Event()
    with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:

        def look() -> None:
            while not done.wait(EVERY):
                found = [_memory(pid) for pid in _family(process.pid)]
                for index in (0, 1):
                    peaks[index] = max(peaks[index], sum(memory[index] for memory in found))

        thread = threading.Thread(target=look)
        thread.start()
        status = process.wait()
        done.set()
        thread.join()
    return Watched(time.perf_counter() - start, peaks[0], peaks[1], status)


def _family(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [pid]
    for number in found:
        try:
            tasks = list(Path(f"/proc/{number}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Returns RssAnon and VmRSS in bytes; zeros if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.split()}
    return int(fields.get("RssAnon", 0)) * 1024, int(fields.get("VmRSS", 0)) * 1024


if __name__ == "__main__":
    import sys

    print(watched(sys.argv[1:], dict(os.environ), None))  # type: ignore[arg-type]
