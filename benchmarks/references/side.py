"""What the scripts of this folder share: the command line, the measurements, and a process for each merge.

It imports the standard library alone, since each script runs in an environment of its own.

    python SIDE --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

A script writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Merge = Callable[[dict[str, Any]], dict[str, float]]
"""Merges as the options of the command line say, and returns the measurements."""


def anonymous() -> int:
    """The bytes of the process's memory that are not pages of files, which both sides map."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Measures the seconds since its start, and the largest growth of the memory, every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._end = threading.Event()
        self._before, self._most, self._start = anonymous(), 0, time.perf_counter()
        self.start()

    def run(self) -> None:
        """Looks at the memory until the end."""
        while not self._end.wait(0.01):
            self._most = max(self._most, anonymous())

    def end(self) -> dict[str, float]:
        """The measurements."""
        seconds = time.perf_counter() - self._start
        self._end.set()
        self.join()
        return {"seconds": seconds, "peak_bytes": max(self._most, anonymous()) - self._before}


def serve(work: Merge) -> None:
    """Does each job of the standard input, one a line, in a process of its own that starts with the imports done, and
    prints a line for it."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps(work(job)), flush=True)
                status = 0
            except Exception as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            finally:
                os._exit(status)
        os.waitpid(child, 0)


def run(work: Merge, page: str | None) -> None:
    """Does what the command line says; `page`: its help."""
    parser = argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--experts", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--method")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument(
        "--jobs", action="store_true", help="reads these options from the standard input, one job a line"
    )
    given = parser.parse_args()
    if given.jobs:
        serve(work)
    else:
        print(json.dumps(work(vars(given))))
