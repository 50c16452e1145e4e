"""The table at the end of a sweep, on the screen and in its folder: a Hydra callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from epmq_cli.errors import first_line
from epmq_cli.report.comparison import AVERAGE, Comparison, compared
from epmq_cli.report.run_folders import Run, read
from epmq_cli.report.table_formats import as_csv, as_json, terminal_table
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import console, log, messages, plain
from epmq_cli.store.atomic import write_text

TABLES = {"results.csv": as_csv, "results.json": as_json}


class SweepTable(Callback):
    """Compares the finished jobs of a sweep, the best first."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table and writes it as CSV and JSON. A failure is a warning, because the results are complete."""
        if not distributed.is_main():
            return
        folder = Path(config.hydra.sweep.dir)
        try:
            runs = read([folder]).runs
            if len(runs) < 2:
                return
            comparison = best_first(runs)
            for name, render in TABLES.items():
                write_text(folder / name, render(comparison))
            console.print(terminal_table(comparison, console.width)[0])
            if comparison.legend:
                console.print(comparison.legend, style="dim", markup=False, highlight=False)
            line = plain(f"the table is in {folder / next(iter(TABLES))}; epmq report {folder} --html FILE draws it")
            messages.print(line, markup=False, highlight=False, soft_wrap=True)
        except Exception as error:  # whatever a folder holds, the sweep is complete
            log.warning("the table of the sweep was not written (%s); epmq report %s", first_line(error), folder)


def best_first(runs: list[Run]) -> Comparison:
    """The comparison of the runs by their average, those without one last."""
    column = compared(runs).column(AVERAGE)
    worst = -column.better * float("inf")
    values = [worst if value is None else value for value in column.values]
    order = sorted(range(len(runs)), key=lambda row: -column.better * values[row])
    return compared([runs[row] for row in order])
