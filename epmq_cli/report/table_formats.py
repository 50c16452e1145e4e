"""A comparison of runs as CSV, Markdown, LaTeX, JSON, and as a table of the terminal."""

from __future__ import annotations

import csv
import io
import json

from rich.table import Table
from rich.text import Text

from epmq_cli.report.comparison import NEAR, Comparison, Renderer
from epmq_cli.runtime.console import plain

NOISE = ("standard error", "within noise")
SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        NEAR: r"$\approx$",
    }
)
"""The characters with a meaning in LaTeX."""


def as_csv(comparison: Comparison) -> str:
    """One line a run with its folder at the end; numbers without rounding. If standard errors are known, two columns
    have that of the average, and whether it is within the noise of the best."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    noisy = any(error is not None for error in comparison.errors)
    writer.writerow([*_heads(comparison), *(NOISE if noisy else ()), "folder"])
    for row, folder in enumerate(comparison.folders):
        settings = [values[row] for values in comparison.settings.values()]
        values = [column.values[row] for column in comparison.columns]
        values += [comparison.errors[row]] if noisy else []
        near = ["yes" if comparison.near and comparison.near[row] else "no"] if noisy else []
        writer.writerow([*settings, *("" if value is None else f"{value:.10g}" for value in values), *near, folder])
    return file.getvalue()


def as_json(comparison: Comparison) -> str:
    """A list with an object for each run: its folder, settings and numbers, the standard error of the average and
    whether it is within the noise of the best."""
    rows = [
        {
            "folder": folder,
            "settings": {key: values[row] for key, values in comparison.settings.items()},
            "numbers": {column.name: column.values[row] for column in comparison.columns},
            "standard_error": comparison.errors[row] if comparison.errors else None,
            "within_noise": bool(comparison.near) and comparison.near[row],
        }
        for row, folder in enumerate(comparison.folders)
    ]
    return json.dumps(rows, indent=2) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """A table of GitHub's Markdown."""
    lines = [[_markdown(head) for head in _heads(comparison)]]
    lines.append(["---"] * len(comparison.settings) + ["---:"] * len(comparison.columns))
    lines += [[_markdown(cell) for cell in cells] for cells in _cells(comparison)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{comparison.legend}\n" if comparison.legend else table


def as_latex(comparison: Comparison) -> str:
    """A tabular for the package booktabs; of each column of scores the best value is bold and the second underlined."""
    lines = [" & ".join(_latex(head) for head in _heads(comparison))]
    first = len(comparison.settings)
    for row, cells in enumerate(_cells(comparison)):
        texts = [_latex(cell) for cell in cells]
        for index, column in enumerate(comparison.columns):
            cell, text = cells[first + index], column.shown(row)
            if text and text == column.ranked(0):
                texts[first + index] = rf"\textbf{{{cell}}}"
            elif text and text == column.ranked(1):
                texts[first + index] = _latex(cell).replace(text, rf"\underline{{{text}}}")
        lines.append(" & ".join(texts))
    head, *rows = [f"{line} \\\\" for line in lines]
    kinds = "l" * first + "r" * len(comparison.columns)
    body = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*body, *([f"% {comparison.legend}"] if comparison.legend else [])]) + "\n"


FORMATS: dict[str, Renderer] = {"csv": as_csv, "markdown": as_markdown, "latex": as_latex, "json": as_json}
"""The formats of files by name."""


def terminal_table(comparison: Comparison, width: int) -> tuple[Table, bool]:
    """The table, and whether it has a column for each task; it has none if the terminal is too narrow for them. The
    best scores are bold."""
    last = 5  # the average, the gap, bits, MB, seconds
    for first in (0, len(comparison.columns) - last):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for key in comparison.settings:
            table.add_column(plain(key), overflow="fold")
        columns = comparison.columns[first:]
        for column in columns:
            table.add_column(Text(plain(column.name)), justify="right", overflow="fold")
        for row in range(len(comparison.folders)):
            settings = [Text(plain(values[row])) for values in comparison.settings.values()]
            table.add_row(
                *settings,
                *(
                    Text(text, style="bold" if text and text == column.ranked(0) else "")
                    for column in columns
                    for text in [comparison.cell(column, row)]
                ),
            )
        if _wide(comparison, first) <= width:
            break
    return table, first == 0


def _wide(comparison: Comparison, first: int) -> int:
    """The width of the table in characters."""
    texts = [[key, *values] for key, values in comparison.settings.items()]
    rows = range(len(comparison.folders))
    texts += [[column.name, *(comparison.cell(column, row) for row in rows)] for column in comparison.columns[first:]]
    return sum(max(map(len, column)) + 2 for column in texts)


def _heads(comparison: Comparison) -> list[str]:
    return [plain(text) for text in (*comparison.settings, *(column.name for column in comparison.columns))]


def _cells(comparison: Comparison) -> list[list[str]]:
    settings = comparison.settings.values()
    return [
        [*(plain(values[row]) for values in settings), *(comparison.cell(column, row) for column in comparison.columns)]
        for row in range(len(comparison.folders))
    ]


def _markdown(text: str) -> str:
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def _latex(text: str) -> str:
    return text.translate(SPECIAL)
