"""Merges model folders with mergekit, for benchmarks/merges.py; runs in mergekit's environment.

    python mergekit_side.py --base DIR --experts DIR DIR DIR --out DIR --method NAME --options JSON

Writes model.safetensors in OUT and prints one line: {"seconds": ..., "peak_bytes": ...}, from the configuration to the
written file, and the growth of the process's memory meanwhile, without pages of files.
`options`: {"parameters": {...}, "expert": {...}, "base": true}, the parameters for all and for each expert, and whether
the base is the base_model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from side import Watch, run


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
    watch = Watch()
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    measured = watch.end()
    written = list(out.glob("*.safetensors"))
    if len(written) == 1:
        written[0].rename(out / "model.safetensors")
    return measured


if __name__ == "__main__":
    run(merge, __doc__)
