"""A table of the sha256 of every checkpoint file, to prove that a change of the code changes no checkpoint.

    python tests/end_to_end/same_bytes.py --out before.json
    python tests/end_to_end/same_bytes.py --against before.json [--only PREFIX] [--quick]

The script uses epmq's command line and finds its classes by name, so the same script runs on older and newer
trees: put the tree to test on PYTHONPATH. Each row runs in a process forked from one that has imported all modules.
Records (epmq.json, README.md, manifest.json) hold options, versions and paths of classes: comparisons list them apart.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before torch; tests/conftest.py does the same
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import hashlib
import importlib
import json
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import same_bytes_models
import torch
import transformers
from same_bytes_rows import ROWS, Row
from same_bytes_table import compare, file_hashes, input_digest, machine, record

import epmq_cli

TREE = Path(epmq_cli.__file__).parent
CLASSES = ("Suite", "Npz", "Table", "Documents")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes or compares a table of the sha256 of checkpoint files.")
    parser.add_argument("--only", metavar="PREFIX", default="*", help="rows whose name begins like this")
    parser.add_argument("--quick", action="store_true", help="a dozen rows, in less than a minute")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="where to write the table")
    parser.add_argument("--against", metavar="FILE.json", type=Path, help="the table to compare with")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--record", action="store_true", help="keep the hashes in same_bytes.json for the tests")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    given = parser.parse_args()
    rows = [row for row in ROWS if fnmatch(row.name, f"{given.only}*")]
    rows = [row for row in rows if row.quick or not given.quick]
    if given.list:
        print("\n".join(row.name for row in rows))
        return
    made = table(rows, given.jobs)
    if given.out:
        given.out.write_text(json.dumps(made, indent=1) + "\n")
    if given.record:
        record(made)
    failed = [name for name, files in made["rows"].items() if "error" in files]
    differ = compare(json.loads(given.against.read_text()), made) if given.against else []
    sys.exit(1 if failed or differ else 0)


def table(rows: Sequence[Row], jobs: int = 1) -> dict[str, Any]:
    """The hashes of the rows, and the values that they depend on."""
    inputs = cached_inputs()
    import_all()
    gc.freeze()
    started, results = time.time(), {}
    with tempfile.TemporaryDirectory(prefix="epmq-same-bytes-") as scratch:
        for name, result in _results(rows, jobs, inputs, Path(scratch)):
            results[name] = result
            failure = f" {result['files']['error']}" if "error" in result["files"] else ""
            print(f"{len(results)}/{len(rows)} {name} {result['seconds']:.1f} s{failure}", flush=True)
    print(f"{len(rows)} rows in {time.time() - started:.0f} s, of the tree {TREE.parent}")
    return {
        "machine": machine(),
        "inputs": {kind: input_digest(inputs, kind) for kind in same_bytes_models.KINDS},
        "seconds": {row.name: results[row.name]["seconds"] for row in rows},
        "rows": {row.name: results[row.name]["files"] for row in rows},
    }


def cached_inputs() -> Path:
    """The folder of the miniature models and data, cached by the versions of their code and of the libraries."""
    code = Path(same_bytes_models.__file__).read_bytes()
    key = hashlib.sha256(code + f"{torch.__version__} {transformers.__version__}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"epmq-same-bytes-inputs-{os.getuid()}-{key}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            transformers.utils.logging.disable_progress_bar()
            same_bytes_models.inputs(Path(unfinished) / "inputs")
            if not folder.exists():
                (Path(unfinished) / "inputs").rename(folder)
    return folder


def _results(rows: Sequence[Row], jobs: int, inputs: Path, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of each row, in order of completion."""
    waiting, running = list(rows), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row = waiting.pop(0)
            place = scratch / re.sub(r"\W", "_", row.name)  # an override with = in its value would need quotes
            place.mkdir()
            running[_fork(lambda row=row, place=place: _run(row, inputs, place))] = (row, place)
        pid, _ = os.wait()
        row, place = running.pop(pid)
        yield row.name, json.loads((place / "result.json").read_text())
        shutil.rmtree(place)


def run_row(row: Row, inputs: Path, place: Path) -> dict[str, str]:
    """The hashes of a row, computed in a separate process. `place`: an empty folder."""
    _check(_wait(_fork(lambda: _run(row, inputs, place))))
    files: dict[str, str] = json.loads((place / "result.json").read_text())["files"]
    return files


def _run(row: Row, inputs: Path, place: Path) -> None:
    """Runs a row and writes result.json."""
    started = time.time()
    try:
        _write_suite(row, place / "configs" / "suite")
        os.chdir(inputs)  # so that paths in suites and records are the same on every machine
        os.environ["EPMQ_CACHE"] = str(place / "cache")
        _HOW[row.how](row, place)
        files = file_hashes(place / "run" / "checkpoint")
    except Exception as error:
        log = (place / "log").read_text()[-2000:] if (place / "log").exists() else ""
        files = {"error": f"{type(error).__name__}: {error} {log}"}
    result = {"files": files, "seconds": round(time.time() - started, 2)}
    (place / "result.json").write_text(json.dumps(result))


def _arguments(row: Row, place: Path, *more: str) -> list[str]:
    suite = ["--config-dir", str(place / "configs"), "suite=mini"] if row.kind else []
    return [row.command, *suite, *row.options, *more, f"out={place / 'run'}"]


def _once(row: Row, place: Path, *more: str) -> None:
    _check(_wait(_fork(lambda: _epmq(_arguments(row, place, *more), place, row.threads))))


def _twice(row: Row, place: Path) -> None:
    """The second run reads the cache of the first."""
    _once(row, place, "cache=1GB")
    shutil.rmtree(place / "run")
    _once(row, place, "cache=1GB")


def _resumed(row: Row, place: Path) -> None:
    """Kills the run at later and later files and continues it each time, until it completes."""
    for kills in range(100):
        status = _wait(_fork(partial(_epmq, _arguments(row, place), place, row.threads, kill=3 * (kills + 1))))
        if status == 0 and kills > 1:
            return
        if status != -signal.SIGKILL:
            raise RuntimeError(f"status {status} after {kills} kills")


def _two_processes(row: Row, place: Path) -> None:
    """Does the same as torchrun, without its imports."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    children = [_fork(lambda rank=rank: _epmq(_arguments(row, place), place, 1, rank)) for rank in ranks]
    for child in children:
        _check(_wait(child))


def _torchrun(row: Row, place: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "epmq_cli", *_arguments(row, place)]
    with (place / "log").open("w") as log:
        path = os.pathsep.join([str(TREE.parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path})


_HOW = {
    "once": _once,
    "twice": _twice,
    "resumed": _resumed,
    "two processes": _two_processes,
    "torchrun": _torchrun,
}


def _epmq(
    arguments: Sequence[str], place: Path, threads: int, environment: dict[str, str] | None = None, kill: int = 0
) -> None:
    """Runs the command `epmq` in this process. `kill`: SIGKILL at the n-th rename of a file in the run folder."""
    from epmq_cli import cli

    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= environment or {}
    torch.set_num_threads(threads)
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and str(args[0]).startswith(str(place / "run")):
            seen += 1
            if seen == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill:
        sys.addaudithook(hook)
    sys.argv = ["epmq", *arguments]
    cli.main()


def _fork(body: Any) -> int:
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        body()
        status = 0
    except SystemExit as stopped:
        status = 1 if isinstance(stopped.code, str) else stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"epmq ended with status {status}")


def _write_suite(row: Row, folder: Path) -> None:
    folder.mkdir(parents=True)
    if row.kind:
        suite = same_bytes_models.suite(row.kind, _targets())
        (folder / "mini.yaml").write_text(json.dumps(suite))  # JSON is YAML


@cache
def _targets() -> dict[str, str]:
    """The location of the classes that suites name."""
    found = {}
    for path in [*sorted(TREE.rglob("*.py")), *sorted((TREE / "data").rglob("*.py"))]:  # data/ takes precedence
        text = path.read_text(encoding="utf-8")
        module = ".".join(path.relative_to(TREE.parent).with_suffix("").parts)
        found |= {name: f"{module}.{name}" for name in CLASSES if re.search(rf"^class {name}\b", text, re.M)}
    return found


def import_all() -> None:
    """Imports the modules that the rows need, for all forked processes."""
    for name in ("open_clip", "compressed_tensors", "sklearn.metrics", "scipy.stats", "numba", "hydra"):
        importlib.import_module(name)
    for found in pkgutil.walk_packages(epmq_cli.__path__, "epmq_cli."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except Exception:  # modules for a GPU, or for an extra that is not installed
                continue
    for name in ("CLIPModel", "BertModel", "LlamaForCausalLM", "AutoTokenizer", "AutoImageProcessor"):
        getattr(transformers, name)


if __name__ == "__main__":
    main()
