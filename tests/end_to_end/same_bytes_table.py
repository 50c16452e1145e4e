"""Tables of hashes: the values that they depend on, their comparison, and the hashes recorded for the tests."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from same_bytes_rows import ROWS, Row

RECORDED = Path(__file__).with_name("same_bytes.json")
RECORDS = ("epmq.json", "README.md", "manifest.json")
VERSIONS = ("torch", "transformers", "numpy", "numba", "safetensors")


def machine() -> str:
    """Identifies everything that rounding of sums depends on: processor, vector instructions and library versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {versions}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The rows of `after` whose weights differ; prints them and the records that differ."""
    if before["machine"] != after["machine"]:
        sys.exit(f"the tables cannot be compared: they are of {before['machine']} and of {after['machine']}")
    others = [kind for kind, digest in after["inputs"].items() if before["inputs"].get(kind, digest) != digest]
    if others:
        sys.exit(f"the tables cannot be compared: they are of other models of {', '.join(others)}")
    differ, records = [], set()
    for name, files in after["rows"].items():
        known = before["rows"].get(name)
        if known is None:
            print(f"new row: {name}")
            continue
        changed = sorted(file for file in known.keys() | files.keys() if known.get(file) != files.get(file))
        records |= {file for file in changed if Path(file).name in RECORDS}
        if changed := [file for file in changed if Path(file).name not in RECORDS]:
            differ.append(name)
            print(f"DIFFERS: {name}: {', '.join(changed)}")
    print(f"{len(differ)} of {len(after['rows'])} rows differ in weights or settings")
    print(f"records that differ, by intention or not: {', '.join(sorted(records)) or 'none'}")
    return differ


def record(made: dict[str, Any]) -> None:
    """Stores the hashes of a table in same_bytes.json, beside those of other machines. Removes earlier rows whose
    models have changed."""
    kept = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"machines": {}}
    own = kept["machines"].setdefault(made["machine"], {"inputs": {}, "rows": {}})
    stale = {kind for kind, digest in own["inputs"].items() if made["inputs"].get(kind) != digest}
    rows = {row.name for row in ROWS if row.kind not in stale}
    own["inputs"] = made["inputs"]
    own["rows"] = {name: files for name, files in own["rows"].items() if name in rows}
    own["rows"] |= {name: short(files) for name, files in made["rows"].items()}
    RECORDED.write_text(json.dumps(kept, indent=1) + "\n")


def recorded(row: Row, inputs: Path) -> dict[str, str] | None:
    """The expected hashes of a row, in the form of `short`; None if nothing is recorded for this machine. Weights of
    portable rows may come from any machine."""
    kept, digest = json.loads(RECORDED.read_text())["machines"], input_digest(inputs, row.kind)
    for name, own in sorted(kept.items(), key=lambda item: item[0] != machine()):
        if own["inputs"].get(row.kind, "") == digest and row.name in own["rows"]:
            files: dict[str, str] = own["rows"][row.name]
            if name == machine():
                return files
            if row.portable:
                return {file: value for file, value in files.items() if file.endswith(".safetensors")}
    return None


def short(files: dict[str, str]) -> dict[str, str]:
    """The first 16 digits of the sha256 of each weight file, and of all other files except records together."""
    weights = {name: value[:16] for name, value in files.items() if name.endswith(".safetensors")}
    others = {name: value for name, value in files.items() if name not in weights and Path(name).name not in RECORDS}
    return {**weights, "others": _digest(others)[:16]}


def file_hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def input_digest(inputs: Path, kind: str) -> str:
    """A digest of the models and data of a kind; empty for the built-in suite."""
    folders = ["data", kind, *(["causal_lm"] if kind == "lora" else [])]
    return (
        _digest({f"{name}/{file}": value for name in folders for file, value in file_hashes(inputs / name).items()})
        if kind
        else ""
    )


def _digest(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
