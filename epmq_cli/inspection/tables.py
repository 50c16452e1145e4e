"""Prints what `epmq inspect` says, in tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rich import box
from rich.table import Table

from epmq_cli.runtime.console import console, plain
from epmq_cli.runtime.units import size


def show(content: Mapping[str, Any]) -> None:
    """Prints the content of one path."""
    heading(content["path"])
    line(_summary(content))
    if content["kind"] == "adapter":
        _adapter(content)
    elif content["kind"] == "checkpoint":
        _checkpoint(content)
    if content.get("parts"):
        show_parts(content)
    values(content)
    refusals(content.get("refused", []))


def _summary(content: Mapping[str, Any]) -> str:
    kind = content["kind"]
    names = content.get("architectures") or []
    facts = [kind, *([names[0]] if names else []), *([f"family {content['family']}"] if content.get("family") else [])]
    if content.get("written_by"):
        facts.append(f"written by {content['written_by']}")
    count = f"{content['tensors']} tensors"
    bits = "" if kind == "checkpoint" else f", {content['bits_per_weight']:g} bits a weight"
    number = "" if kind == "checkpoint" else f", {amount(content['parameters'])} parameters"
    return f"{', '.join(facts)}: {count}{number}, {size(content['bytes'])}{bits}"


def show_parts(content: Mapping[str, Any]) -> None:
    """Prints the table of parts and what a run does with them."""
    rows = [
        (
            row["part"],
            row["treatment"],
            row["tensors"],
            amount(row["parameters"]),
            " ".join(row["types"]),
            size(row["bytes"]),
            f"{row['bits_per_weight']:g}",
        )
        for row in content["parts"]
    ]
    table(("part", "a run", "tensors", "parameters", "types", "size", "bits"), rows, left=(0, 1, 4))
    merged, left = content["merged"], content["left"]
    line(
        f"a run merges {amount(merged)} parameters, quantizes {amount(content['quantized'])} of them, and leaves "
        f"{amount(left)} as the base has them"
    )
    if content["left_names"]:
        more = content["left_more"]
        line(f"left: {', '.join(content['left_names'])}{f' and {more} more' if more else ''}")


def _adapter(content: Mapping[str, Any]) -> None:
    kinds = [name for name in ("rslora", "dora") if content[name]]
    facts = [str(content["peft_type"]), *kinds, f"alpha {content['alpha']}", f"trained on {content['base']}"]
    line(", ".join(facts))
    if content.get("targets"):
        ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in content["ranks"].items())
        line(f"rank {ranks}; {', '.join(f'{name} x {count}' for name, count in content['targets'].items())}")
    for name in ("whole_tensors", "token_rows"):
        if content.get(name):
            line(f"{name.replace('_', ' ')}: {', '.join(content[name])}")


def _checkpoint(content: Mapping[str, Any]) -> None:
    run = content.get("run") or {}
    suite = f", suite {run['suite']}, {run['quant']}" if run.get("suite") else ""
    line(f"format {content['format']}{suite}, {content['linears']} quantized linears")
    for title in ("formats", "layers"):
        common = prefix_line([row["name"] for row in content[title] if "." in row["name"]])
        rows = [
            (
                row["name"].removeprefix(common),
                row["linears"],
                amount(row["weights"]),
                f"{row['bits']:g}",
                f"{row['bits_per_weight']:.2f}",
                ", ".join("row" if columns == -1 else str(columns) for columns in row["group_sizes"]),
                size(row["bytes"]),
            )
            for row in content[title]
        ]
        if rows:
            table((title[:-1], "linears", "weights", "bits", "with scales", "group", "size"), rows, left=(0,))

    if content["formats"]:
        rest = content["bytes"] - sum(row["bytes"] for row in content["formats"])
        line(f"other tensors, which are not quantized: {size(rest)}")


def values(content: Mapping[str, Any]) -> None:
    """Prints what `--deep` read of the tensors of one model."""
    deep = content.get("values")
    if deep is None:
        return
    rows = [(row["part"], f"{row['norm']:.4g}", f"{row['largest']:.4g}") for row in deep["parts"]]
    table(("part", "norm", "largest"), rows, left=(0,))
    bad = deep["not_finite"]
    line(f"NaN or infinity: {', '.join(f'{name} ({count})' for name, count in bad.items()) if bad else 'none'}")


def refusals(sentences: Sequence[str]) -> None:
    """Prints what a run would refuse."""
    for sentence in sentences:
        console.print(plain(f"refused: {sentence}"), style="red", markup=False, highlight=False, soft_wrap=True)


def heading(text: str) -> None:
    """Prints a line in bold."""
    console.print(plain(text), style="bold", markup=False, highlight=False, soft_wrap=True)


def line(text: str) -> None:
    """Prints a line."""
    console.print(plain(text), markup=False, highlight=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[int]) -> None:
    """Prints a table; `left`: the columns that are aligned left, which may wrap."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold", no_wrap=index not in left)
    for row in rows:
        made.add_row(*(plain(str(cell)) for cell in row))
    console.print(made)


def prefix_line(names: list[str]) -> str:
    """The segments that all names of layers begin with, which a line names, so that the table below may omit them."""
    parts = [name.split(".")[:-1] for name in names]
    same = takewhile(lambda segments: len(set(segments)) == 1, zip(*parts, strict=False))
    prefix = "".join(f"{segments[0]}." for segments in same)
    if prefix:
        line(f"in {prefix.rstrip('.')}:")
    return prefix


def amount(number: int) -> str:
    """A number of parameters, in thousands, millions or billions."""
    for least, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= least:
            return f"{number / least:.3g} {unit}"
    return str(number)
