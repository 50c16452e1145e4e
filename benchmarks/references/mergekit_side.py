"""Merges model folders with mergekit, for benchmarks/merges.py; runs in mergekit's environment.

    python mergekit_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the configuration to the
written file, and the growth of the process's memory meanwhile. `options`: {"parameters": {...}, "expert": {...},
"base": true}, the parameters for all and for each expert, and whether the base is the base_model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def memory(field: str) -> int:
    """The process's resident memory (VmRSS), or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def merge(job: dict[str, Any]) -> dict[str, float]:
    """Merges and returns the measurements."""
    wanted, out = job["options"], Path(job["out"])
    recipe = {
        "merge_method": job["method"],
        "models": [{"model": path, "parameters": wanted.get("expert", {})} for path in job["experts"]],
        "parameters": wanted.get("parameters", {}),
    }
    if wanted.get("base", True):
        recipe["base_model"] = job["base"]
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, start = memory("VmRSS"), time.perf_counter()
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    measured = {"seconds": time.perf_counter() - start, "peak_bytes": memory("VmHWM") - before}
    written = list(out.glob("*.safetensors"))
    if len(written) == 1:
        written[0].rename(out / "model.safetensors")
    return measured


def serve(work: Callable[[dict[str, Any]], dict[str, float]]) -> None:
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--experts", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--method")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument(
        "--jobs", action="store_true", help="reads these options from the standard input, one job a line"
    )
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.jobs:
        serve(merge)
    else:
        print(json.dumps(merge(vars(given))))
