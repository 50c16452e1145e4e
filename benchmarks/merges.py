"""Compares epmq's merge methods with mergekit's and FusionBench's: the same random models, tensor by tensor.

    python benchmarks/merges.py                        # models of 0.2 M parameters
    python benchmarks/merges.py --size 135M --repeats 3
    python benchmarks/merges.py --methods ties della

Base and experts are Llamas with random weights in float32, made once in runs/merges. Each expert is the base plus
noise that all share, whose size differs between tensors and elements, and noise of its own. The script makes an
environment of its own for each reference that has a script in benchmarks/references. Every merge is a process of its
own, which measures the seconds from the opened models to the written file, and the growth of its memory without pages
of files; its imports are done before.

The table has the largest difference of each tensor, as a fraction of the largest change of this tensor by the
reference: the median and the largest over the tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from merging import EXPERTS, MERGEKIT, SHAPE, environment
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "tie_word_embeddings": True,
    },
    "135M": SHAPE,
}
REFERENCES = {"mergekit": MERGEKIT, "fusion_bench": "fusion-bench==0.2.33"}
Call = tuple[str, dict[str, Any]]
"""A reference's name of a method, and the options that its script takes."""


@dataclass(frozen=True)
class Row:
    """One comparison: `merge` with some options, and the calls of the references that have this method. `experts`: how
    many it merges. `note`: why the results differ, if they do so on purpose."""

    merge: str
    options: dict[str, Any] = field(default_factory=dict)
    mergekit: Call | None = None
    fusion_bench: Call | None = None
    experts: int = 3
    note: str = ""


def generalized(name: str, weight: float = 1.0, base: bool = True, **parameters: Any) -> Call:
    """A call of mergekit with a weight, and perhaps `density`, `gamma` and `epsilon`, for each expert."""
    own = {key: parameters.pop(key) for key in ("density", "gamma", "epsilon") if key in parameters}
    return name, {"parameters": parameters, "expert": {"weight": weight, **own}, "base": base}


RANDOM = "Other random numbers: mergekit's come from one stream, and it rescales each tensor by one factor."
EQUAL = "Elements whose magnitude equals the threshold are all kept; mergekit keeps an exact number."
STOCK = "Cosines are exact; mergekit takes the product of two lengths as at least 1e-6, and t may be below 0."
TIED = "FusionBench counts the tied embeddings twice, which moves the threshold."
ALL: dict[str, Any] = {"tables": "merge"}
HALF: dict[str, Any] = {"density": 0.5}
ROWS = [
    Row("average", {}, generalized("linear", base=False), ("average", {})),
    Row("linear", {"weights": 0.7, "normalize": False}, generalized("linear", 0.7, False, normalize=False)),
    Row("task_arithmetic", {"scale": 0.3}, generalized("task_arithmetic", 0.3), ("task_arithmetic", {})),
    Row(
        "ties",
        {"density": 0.2, "combine": "sum", "scale": 0.3, "scope": "tensor"},
        generalized("ties", **{"lambda": 0.3, "density": 0.2, "normalize": False}),
        note=EQUAL,
    ),
    Row(
        "ties",
        {"density": 0.2, "combine": "mean", "scale": 1, "scope": "tensor"},
        generalized("ties", density=0.2, normalize=True),
        note=EQUAL,
    ),
    Row(
        "ties",
        {"density": 0.2, "combine": "sum", "scale": 0.3},
        generalized("ties", **{"lambda": 0.3, "density": 0.2, "normalize": False}),
        ("ties", {}),
        note="epmq and FusionBench trim the whole task vector, as the paper does; mergekit trims each tensor. " + TIED,
    ),
    Row("dare_linear", {"density": 1, "scale": 0.3}, generalized("dare_linear", 0.3, density=1.0)),
    Row("dare_linear", {"density": 0.5, "scale": 0.3}, generalized("dare_linear", 0.3, **HALF), note=RANDOM),
    Row("dare_ties", {"density": 0.5, "scale": 0.3}, generalized("dare_ties", **{"lambda": 0.3}, **HALF), note=RANDOM),
    Row("della_linear", {"density": 1, "scale": 0.3}, generalized("della_linear", 0.3, density=1.0)),
    Row("della_linear", {"scale": 0.3}, generalized("della_linear", 0.3, epsilon=0.15, **HALF), note=RANDOM),
    Row("della", {"density": 1}, generalized("della", density=1.0)),
    Row("della", {}, generalized("della", epsilon=0.15, **HALF), note=RANDOM),
    Row("breadcrumbs", {"scale": 0.3}, generalized("breadcrumbs", 0.3, density=0.9, gamma=0.01)),
    Row(
        "breadcrumbs_ties", {"scale": 0.3}, generalized("breadcrumbs_ties", **{"lambda": 0.3}, density=0.9, gamma=0.01)
    ),
    Row("model_stock", {}, ("model_stock", {}), note=STOCK),
    Row("model_stock", {"filter_wise": True}, ("model_stock", {"parameters": {"filter_wise": True}}), note=STOCK),
    Row(
        "sce",
        {},
        ("sce", {}),
        note="Coefficients follow the paper; mergekit's are equal if the mean squares sum to less than 1e-6.",
    ),
    Row("sce", {"select_topk": 0.5}, ("sce", {"parameters": {"select_topk": 0.5}}), note="As above."),
    Row(
        "karcher",
        {},
        ("karcher", {"base": False}),
        note="Angles between experts are in float64; in mergekit's float32 small ones are off by up to 0.0005.",
    ),
    Row("multislerp", {}, generalized("multislerp", base=False)),
    Row("multislerp", {"task_vectors": True}, generalized("multislerp")),
    Row("ram", {}, ("ram", {})),
    Row("ram", {"r": 0.1, "scope": "tensor"}, ("ramplus_tl", {})),
    Row("slerp", {"t": 0.3}, ("slerp", {"parameters": {"t": 0.3}}), experts=1),
    Row("nuslerp", {}, generalized("nuslerp", base=False), experts=2),
    Row("nuslerp", {"task_vectors": True}, generalized("nuslerp"), experts=2),
    Row("nuslerp", {"nuslerp_flatten": False}, generalized("nuslerp", base=False, nuslerp_flatten=False), experts=2),
    Row("nearswap", {"t": 1e-4}, ("nearswap", {"parameters": {"t": 1e-4}}), experts=1),
    Row(
        "arcee_fusion",
        {},
        ("arcee_fusion", {}),
        experts=1,
        note="Divergences in float64; mergekit's float32 ones are as small as its rounding, and may be negative.",
    ),
    Row("geometric_median"),
    Row("tsv_m", ALL, None, ("tsv_m", {})),
    Row("iso_c", ALL, None, ("iso_c", {})),
    Row("iso_cts", ALL, None, ("iso_cts", {})),
    Row("wudi", ALL, None, ("wudi", {})),
    Row("wudi", {**ALL, "solver": "closed_form"}),
    Row("magmax", {}, None, ("magmax", {})),
    Row("consensus_ta", {}, None, ("consensus_ta", {})),
    Row("consensus_ties", {}, None, ("consensus_ties", {}), note=TIED),
    Row(
        "task_arithmetic",
        {"scale": 0.3, "post": [{"name": "svc", "alpha": 0.1, "tables": "merge"}]},
        None,
        ("svc", {}),
    ),
    Row("ace"),
    Row("pcb"),
]


def make(folder: Path, shape: dict[str, Any]) -> None:
    """Makes base and experts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / EXPERTS[-1] / "model.safetensors").is_file():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shared = {
        name: 10 ** (torch.rand(()) * 2 - 4) * torch.randn_like(tensor).exp() * torch.randn_like(tensor)
        for name, tensor in start.items()
    }
    for name in ("base", *EXPERTS):
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                noise = shared[part] + shared[part].std() * torch.randn_like(parameter)
                parameter.copy_(start[part] + (name != "base") * noise)
        model.save_pretrained(folder / name)


def job(folder: Path, side: str, row: Row, call: Call) -> dict[str, Any]:
    """What a side has to do."""
    experts = [str(folder / name) for name in EXPERTS[: row.experts]]
    out = str(folder / "out" / side)
    return {"base": str(folder / "base"), "experts": experts, "out": out, "method": call[0], "options": call[1]}


class Side:
    """The script of epmq or of a reference, which imports once and forks for each run. A run that takes longer than
    `limit` seconds is ended."""

    def __init__(self, name: str, python: Path | str, limit: float) -> None:
        self.name = name
        self.limit = limit
        self._command = [str(python), str(HERE / "references" / f"{name}_side.py"), "--jobs"]
        self._env = {**os.environ, "PYTHONPATH": str(HERE.parent)} if name == "epmq" else None
        self._server: subprocess.Popen[str] | None = None

    def run(self, one: dict[str, Any]) -> dict[str, Any]:
        """The measurements of a job, or its error."""
        if self._server is None:
            pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
            self._server = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=self._env, start_new_session=True
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        timer = threading.Timer(self.limit, os.killpg, (self._server.pid, signal.SIGKILL))
        timer.start()
        self._server.stdin.write(json.dumps(one) + "\n")
        self._server.stdin.flush()
        answer = next((line for line in self._server.stdout if line.startswith("{")), None)
        ended_by_us = not timer.is_alive()
        timer.cancel()
        if answer:
            return json.loads(answer)
        self._server = None
        return {"error": f"more than {self.limit:.0f} s" if ended_by_us else "the process ended"}


def differences(one: Path, other: Path, base: Path) -> tuple[float, float]:
    """The median and the largest difference over the tensors, relative to the largest change of each tensor."""
    found = []
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(one / "model.safetensors", "pt") as ours,
        safe_open(other / "model.safetensors", "pt") as theirs,
    ):
        for name in ours.keys():  # noqa: SIM118
            wanted = theirs.get_tensor(name).float()
            change = float((wanted - before.get_tensor(name)).abs().max())
            found.append(float((ours.get_tensor(name) - wanted).abs().max()) / (change or 1.0))
    return statistics.median(found), max(found)


def compare(row: Row, sides: list[Side], folder: Path, repeats: int) -> str:
    """One line of the table."""
    cells, gaps, notes = dict.fromkeys((side.name for side in sides), ""), [], [row.note]
    shutil.rmtree(folder / "out", ignore_errors=True)
    for side in sides:
        call: Call | None = (row.merge, row.options) if side.name == "epmq" else getattr(row, side.name)
        if call is None:
            continue
        results = list[dict[str, Any]]()
        for _ in range(repeats):
            results.append(side.run(job(folder, side.name, row, call)))
            if "error" in results[-1]:
                break
        if "error" in results[-1]:
            notes.append(f"{side.name}: {results[-1]['error']}")
            continue
        seconds, peak = (statistics.median(result[key] for result in results) for key in ("seconds", "peak_bytes"))
        cells[side.name] = f"{seconds:.2f} s, {peak / 1e6:.0f} MB"
    for name in list(cells)[1:]:
        both = cells["epmq"] and cells[name]
        paths = folder / "out" / "epmq", folder / "out" / name, folder / "base"
        gaps.append("{:.0e} / {:.0e}".format(*differences(*paths)) if both else "")
    options = ", ".join(f"{key}={value}" for key, value in row.options.items())
    return f"| {' | '.join([row.merge, options, *gaps, *cells.values(), ' '.join(notes).strip()])} |"


def main() -> None:
    """Parses the command line, and prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, help="seconds until a merge is ended, imports included")
    parser.add_argument("--out", type=Path, default=Path("runs/merges"))
    parser.add_argument("--mergekit-env", type=Path, default=Path(".venv-mergekit"))
    parser.add_argument("--fusion-bench-env", type=Path, default=Path(".venv-fusion-bench"))
    given = parser.parse_args()
    folder = given.out.resolve() / given.size
    make(folder, SIZES[given.size])
    pythons = {
        name: environment(getattr(given, f"{name}_env"), requirement)
        for name, requirement in REFERENCES.items()
        if (HERE / "references" / f"{name}_side.py").is_file()
    }
    threads = torch.get_num_threads()
    print(f"Differences: median / largest over tensors. Medians of {given.repeats} runs, {threads} threads.\n")
    sides = [Side(name, python, given.limit) for name, python in {"epmq": sys.executable, **pythons}.items()]
    columns = ["merge", "options", *(f"difference to {name}" for name in pythons), "epmq", *pythons, "note"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in ROWS:
        if not given.methods or row.merge in given.methods:
            print(compare(row, sides, folder, given.repeats), flush=True)


if __name__ == "__main__":
    main()
