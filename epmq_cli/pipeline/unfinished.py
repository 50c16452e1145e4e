"""Finds the folder in which the same command continues. The default `out` is a new folder each time, so the folders of
unfinished runs and sweeps hold a mark with the arguments of the command.

With `out=FOLDER`, that folder is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from epmq_cli.errors import RunError
from epmq_cli.runtime import distributed
from epmq_cli.runtime.paths import read_regular
from epmq_cli.store.atomic import write_text
from epmq_cli.store.run_lock import FOLDER, RESULTS, in_use, refuse_used

if TYPE_CHECKING:
    from epmq_cli.pipeline.progress import RunProgress

MARK = ".unfinished"
PACKING = "packing"
"""The mark in a run's progress after which the checkpoint is its own."""
RUNS = Path("runs")
"""The folder of the default `out`."""
VARIABLE = "EPMQ_COMMAND"
"""An environment variable for the processes of a sweep: the arguments, if they do not set the folder."""
PLACED = ("out=", "hydra.run.dir=", "hydra.sweep.dir=", "hydra.sweep.subdir=")
ELSEWHERE = ("out", "resume", "device")
"""Options that do not make a job a different one."""
SHOWING = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--resolve", "-sc", "--shell-completion")


def continued(arguments: Sequence[str]) -> list[str]:
    """The arguments of `epmq run`, and the folder of the last unfinished run or sweep with the same arguments, if one
    exists that no process is using."""
    names = [argument.lstrip("+") for argument in arguments]
    if any(argument.startswith(PLACED) or argument in SHOWING for argument in names):
        return list(arguments)
    os.environ[VARIABLE] = json.dumps(_asked(arguments))
    marked = [] if "resume=never" in names else _marked(arguments)
    folders = [folder for folder in marked if not all((folder / name).exists() for name in RESULTS)]
    return [f"out={folders[-1]}", *arguments] if folders else list(arguments)


def begin(folder: Path) -> None:
    """Marks the folder of a run or sweep that was started without `out`."""
    asked = os.environ.get(VARIABLE)
    if asked is not None and not (folder / MARK).exists():
        write_text(folder / MARK, asked + "\n")


def typed(overrides: Sequence[str]) -> list[str]:
    """The overrides without the folder that `continued` added."""
    return [override for override in overrides if VARIABLE not in os.environ or not override.startswith("out=")]


def end(arguments: Sequence[str]) -> None:
    """Removes the marks of a command that has finished."""
    if VARIABLE in os.environ:
        for folder in _marked(arguments):
            (folder / MARK).unlink(missing_ok=True)


def done(folder: Path, cfg: DictConfig) -> bool:
    """Whether a folder holds the results of exactly this job of a sweep."""
    if not all((folder / name).exists() for name in RESULTS):
        return False
    config = _config(folder / RESULTS[1])
    expected = json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    return all(config.get(key) == value for key, value in expected.items() if key not in ELSEWHERE)


def _config(path: Path) -> dict[str, Any]:
    """The config in a metrics.json; RunError if it has none."""
    try:
        config = json.loads(read_regular(path))["config"]
        return dict(config.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is corrupted; remove {path.parent} and start the same command again") from error


def _mark(path: Path) -> str | None:
    """The text of a mark; None if it cannot be read, for example because another user owns it."""
    try:
        return read_regular(path)
    except (OSError, ValueError):
        return None


def _asked(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith(("resume=", "out="))]


def _marked(arguments: Sequence[str]) -> list[Path]:
    """The unfinished folders of a command that no process is using, oldest first."""
    asked = json.dumps(_asked(arguments)) + "\n"
    marks = [mark for mark in sorted(RUNS.glob(f"*/{MARK}")) if _mark(mark) == asked]
    return [mark.parent for mark in marks if not in_use(mark.parent)]


def refuse_results(folder: Path, progress: RunProgress | None = None) -> None:
    """Refuses a folder with results, except for the checkpoint of this run; if `progress` is not open yet, of any
    unfinished run."""
    mark = f"{PACKING}.json"
    own = any((folder / FOLDER).glob(f"*/{mark}")) if progress is None else progress.has(mark)
    if distributed.is_main():
        refuse_used(folder, *(RESULTS[1:] if own and not (folder / RESULTS[1]).exists() else RESULTS))
