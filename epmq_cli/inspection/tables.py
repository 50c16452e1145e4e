"""Prints what `epmq inspect` says, in tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from epmq_cli.inspection import sentences
from epmq_cli.inspection.rows import checkpoint_rows, common_prefix, part_rows, value_rows
from epmq_cli.runtime.console import console, plain


def show(content: Mapping[str, Any]) -> None:
    """Prints the content of one path."""
    heading(content["path"])
    line(sentences.summary(content))
    if content["kind"] == "adapter":
        lines(sentences.adapter(content))
    elif content["kind"] == "checkpoint":
        _checkpoint(content)
    if content.get("parts"):
        show_parts(content)
    if content.get("values"):
        table(*value_rows(content["values"]))
        line(sentences.not_finite(content["values"]))
    refusals(content.get("refused", []))


def show_parts(content: Mapping[str, Any]) -> None:
    """Prints the table of parts and what a run does with them."""
    table(*part_rows(content))
    lines([sentences.treatment(content), *sentences.left(content)])


def _checkpoint(content: Mapping[str, Any]) -> None:
    line(sentences.checkpoint(content))
    for title in ("formats", "layers"):
        prefix = prefix_line([row["name"] for row in content[title]])
        if content[title]:
            table(*checkpoint_rows(content, title, prefix))
    lines(sentences.unquantized(content))


def refusals(reasons: Sequence[str]) -> None:
    """Prints what a run would refuse."""
    for reason in reasons:
        console.print(plain(f"refused: {reason}"), style="red", markup=False, highlight=False, soft_wrap=True)


def heading(text: str) -> None:
    """Prints a line in bold."""
    console.print(plain(text), style="bold", markup=False, highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """Prints a line."""
    console.print(plain(text), markup=False, highlight=False)


def lines(texts: Sequence[str]) -> None:
    """Prints some lines."""
    for text in texts:
        line(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int]) -> None:
    """Prints a table; `left`: the columns that are aligned left, which may wrap."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold", no_wrap=index not in left)
    for row in rows:
        made.add_row(*(plain(str(cell)) for cell in row))
    console.print(made)


def prefix_line(names: Sequence[str]) -> str:
    """The segments that all names of layers begin with, which a line names, so that the table below may omit them."""
    prefix = common_prefix(names)
    if prefix:
        line(f"in {prefix.rstrip('.')}:")
    return prefix
