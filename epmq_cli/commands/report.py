"""`epmq report RUN...`: compares runs in one table, and makes pages of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from epmq_cli.commands.output_file import check_output, write_output
from epmq_cli.errors import RunError
from epmq_cli.runtime.console import console, messages, plain

if TYPE_CHECKING:
    from epmq_cli.report.run_folders import Run

DESCRIPTION = """Shows runs in one table: the overrides that differ, the score of each task, the average, the share of
the gap between the dense merge and the experts that is closed, bits a weight, MB and seconds. RUN is the folder of a
run, or of a sweep, also while it runs. Reads metrics.json only."""
FORMATS = ("csv", "markdown", "latex", "json")


def main(arguments: list[str]) -> None:
    """Prints the table or writes it to a file. Exits with 1 if no folder holds a finished run."""
    parser = argparse.ArgumentParser(prog="epmq report", description=DESCRIPTION)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--format", choices=FORMATS, help="print the table in this format; latex needs booktabs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to a file, by default as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that compares the runs, with plots")
    parser.add_argument("--pages", action="store_true", help="also write report.html into each run folder again")
    parser.add_argument(
        "--debug", action="store_true", help="print a traceback in place of a one-sentence error message"
    )
    chosen = parser.parse_args(arguments)
    check_output("--out", chosen.out)
    check_output("--html", chosen.html)
    runs = _finished(chosen.runs)
    _show(runs, chosen.format, chosen.out)
    if chosen.html:
        from epmq_cli.report.page.comparison import comparison_page

        write_output(chosen.html, comparison_page(runs))
    if chosen.pages:
        _write_pages(runs)


def _finished(folders: list[Path]) -> list[Run]:
    """The finished runs; RunError if there are none. Prints a sentence for every other folder."""
    from epmq_cli.report.run_folders import read

    found = read(folders)
    if not found.runs:
        raise RunError("; ".join(found.notes) or "no folder was given")
    for note in found.notes:
        messages.print(plain(note), style="yellow", markup=False, highlight=False, soft_wrap=True)
    return found.runs


def _show(runs: list[Run], kind: str | None, out: Path | None) -> None:
    from epmq_cli.report.comparison import compared
    from epmq_cli.report.table_formats import FORMATS as RENDERERS
    from epmq_cli.report.table_formats import terminal_table

    comparison = compared(runs)
    if out is not None:
        write_output(out, RENDERERS[kind or "csv"](comparison))
    elif kind is not None:
        print(RENDERERS[kind](comparison), end="", flush=True)
    else:
        table, complete = terminal_table(comparison, console.width)
        console.print(table)
        if comparison.legend:
            console.print(comparison.legend, style="dim", markup=False, highlight=False)
        if not complete:
            console.print("The terminal is too narrow for the tasks; --format csv has them.", style="dim")


def _write_pages(runs: list[Run]) -> None:
    from epmq_cli.report.page.page import write_report

    for run in runs:
        if write_report(run.folder, run.content):
            messages.print(plain(f"wrote {run.folder / 'report.html'}"), markup=False, highlight=False, soft_wrap=True)
