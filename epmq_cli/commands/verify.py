"""`epmq verify CHECKPOINT`: checks that a checkpoint is what `epmq run` or `epmq merge` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from epmq_cli.commands.hydra_app import quiet_libraries
from epmq_cli.errors import CheckpointError
from epmq_cli.runtime.console import console, plain

DESCRIPTION = """Checks that a checkpoint folder is what epmq run or merge wrote. Compares the size and sha256 of every
file with manifest.json, and the names, shapes and values of all tensors with config.json. --scores also compares its
scores with the metrics.json of its run."""


def main(arguments: list[str]) -> None:
    """Prints the checks that passed, or every problem. Exits with 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="epmq verify", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder")
    parser.add_argument("--scores", action="store_true", help="also score the checkpoint; takes as long as epmq eval")
    parser.add_argument(
        "--device", default="auto", help="the device for --scores: auto (the default), cpu, cuda or cuda:<index>"
    )
    parser.add_argument("--data-root", help="a local mirror of the hub, in place of the one that the run used")
    parser.add_argument(
        "--debug", action="store_true", help="print a traceback in place of a one-sentence error message"
    )
    chosen = parser.parse_args(arguments)
    verify(chosen.checkpoint, chosen.scores, chosen.device, chosen.data_root)


def verify(checkpoint: Path, scores: bool, device: str, data_root: str | None) -> None:
    """Prints every problem of the checkpoint, then raises CheckpointError if there is one.

    Checks files, then tensors, then scores. A check runs only if the checks before it passed.
    """
    from epmq_cli.store.manifest import file_problems

    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder; give the checkpoint folder that epmq run or merge wrote")
    report_problems(checkpoint, file_problems(checkpoint))
    quiet_libraries()
    from epmq_cli.config.instantiate import device_of
    from epmq_cli.pipeline import verify

    report_problems(checkpoint, verify.tensor_problems(checkpoint))
    if scores:
        report_problems(checkpoint, verify.score_problems(checkpoint, device_of(device), data_root))
    checked = "files, tensors and scores are" if scores else "files and tensors are"
    console.print(plain(f"{checkpoint}: {checked} what epmq wrote"), markup=False, highlight=False, soft_wrap=True)


def report_problems(checkpoint: Path, problems: list[str]) -> None:
    """Prints every problem; CheckpointError if there is one."""
    if not problems:
        return
    for problem in problems:
        console.print(plain(problem), markup=False, highlight=False, soft_wrap=True)
    others = f" and {len(problems) - 1} more (above)" if len(problems) > 1 else ""
    raise CheckpointError(
        f"{checkpoint} is not what epmq wrote: {problems[0]}{others}; fetch it again, or write it again with epmq"
    )
