"""`epmq verify CHECKPOINT`: whether a checkpoint is what `epmq run` or `epmq merge` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.errors import CheckpointError
from epmq_cli.runtime.console import console, plain

DESCRIPTION = """Checks that a checkpoint folder is what epmq run or merge wrote: size and sha256 of every file by its
manifest.json, names, shapes and values of all tensors by its config.json and, with --scores, that it scores as the
metrics.json of its run says."""


def main(arguments: list[str]) -> None:
    """Prints what was checked, or every problem that was found; exits with 1 where there is one."""
    parser = argparse.ArgumentParser(prog="epmq verify", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the folder")
    parser.add_argument("--scores", action="store_true", help="score it again; takes as long as epmq eval")
    parser.add_argument("--device", default="auto", help="to score on: auto (the default), cpu, cuda or cuda:<index>")
    parser.add_argument("--data-root", help="a mirror of the hub on this machine, in place of the one that the run had")
    parser.add_argument(
        "--debug", action="store_true", help="a traceback in place of the sentence that says what is wrong"
    )
    chosen = parser.parse_args(arguments)
    verify(chosen.checkpoint, chosen.scores, chosen.device, chosen.data_root)


def verify(checkpoint: Path, scores: bool, device: str, data_root: str | None) -> None:
    """CheckpointError where the checkpoint is not what epmq wrote, when every problem has been printed.

    Each check is made only of what passed the ones before it: files, then tensors, then scores.
    """
    from epmq_cli.store.manifest import file_problems

    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder; give the checkpoint folder that epmq run or merge wrote")
    _report(checkpoint, file_problems(checkpoint))
    quiet_libraries()
    from epmq_cli.config.instantiate import device_of
    from epmq_cli.pipeline import verify

    _report(checkpoint, verify.tensor_problems(checkpoint))
    if scores:
        _report(checkpoint, verify.score_problems(checkpoint, device_of(device), data_root))
    checked = "files, tensors and scores are" if scores else "files and tensors are"
    console.print(plain(f"{checkpoint}: {checked} what epmq wrote"), markup=False, highlight=False, soft_wrap=True)


def _report(checkpoint: Path, problems: list[str]) -> None:
    if not problems:
        return
    for problem in problems:
        console.print(plain(problem), markup=False, highlight=False, soft_wrap=True)
    others = f" and {len(problems) - 1} more (above)" if len(problems) > 1 else ""
    raise CheckpointError(
        f"{checkpoint} is not what epmq wrote: {problems[0]}{others}; fetch it again, or make it again with epmq run"
    )
