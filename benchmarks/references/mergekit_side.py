"""Merges model folders with mergekit, for benchmarks/merges.py; runs in mergekit's environment.

    python mergekit_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the configuration to the
written file, and the growth of the process's memory meanwhile. `options`: {"parameters": {...}, "expert": {...},
"base": true}, the parameters for all and for each expert, and whether the base is the base_model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def memory(field: str) -> int:
    """The process's resident memory (VmRSS), or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Merges and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    each = given.options.get("expert", {})
    recipe = {
        "merge_method": given.method,
        "models": [{"model": str(path), "parameters": each} for path in given.experts],
        "parameters": given.options.get("parameters", {}),
    }
    if given.options.get("base", True):
        recipe["base_model"] = str(given.base)
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, start = memory("VmRSS"), time.perf_counter()
    run_merge(MergeConfiguration.model_validate(recipe), str(given.out), options)
    measured = {"seconds": time.perf_counter() - start, "peak_bytes": memory("VmHWM") - before}
    written = list(given.out.glob("*.safetensors"))
    if len(written) == 1:
        written[0].rename(given.out / "model.safetensors")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
