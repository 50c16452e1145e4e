"""The rows of the tables of `epmq inspect`, in the terminal and on its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from epmq_cli.inspection.sentences import amount, mean
from epmq_cli.runtime.units import size


class Rows(NamedTuple):
    """A table. `left`: the columns that are aligned left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: Sequence[int]


def part_rows(content: Mapping[str, Any]) -> Rows:
    """The parts of a model, and what a run does with them."""
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
    return Rows(("part", "a run", "tensors", "parameters", "types", "size", "bits"), rows, (0, 1, 4))


def checkpoint_rows(content: Mapping[str, Any], title: str, prefix: str) -> Rows:
    """The quantized linears by format or layer (`title`: formats or layers). `prefix`: of names, which is left out."""
    rows = [
        (
            row["name"].removeprefix(prefix),
            row["linears"],
            amount(row["weights"]),
            f"{row['bits']:g}",
            f"{row['bits_per_weight']:.2f}",
            ", ".join("row" if columns == -1 else str(columns) for columns in row["group_sizes"]),
            size(row["bytes"]),
        )
        for row in content[title]
    ]
    return Rows((title[:-1], "linears", "weights", "bits", "with scales", "group", "size"), rows, (0,))


def value_rows(values: Mapping[str, Any]) -> Rows:
    """Norms and largest magnitudes by part."""
    rows = [(row["part"], f"{row['norm']:.4g}", f"{row['largest']:.4g}") for row in values["parts"]]
    return Rows(("part", "norm", "largest"), rows, (0,))


def model_rows(content: Mapping[str, Any]) -> Rows:
    """The base and the experts."""
    rows = [
        (
            name,
            amount(own["parameters"]),
            " ".join(own["types"]),
            size(own["bytes"]),
            amount(content["heads_of_experts"].get(name, 0)),
            content["processors"].get(name, ""),
        )
        for name, own in content["models"].items()
    ]
    return Rows(("model", "parameters", "types", "size", "head", "tokenizer or processor"), rows, (0, 2, 5))


def vector_rows(content: Mapping[str, Any], shown: Sequence[str]) -> Rows:
    """The task vectors, with their cosines with the experts `shown`."""
    total = content["total"]
    rows = [
        (
            f"{index} {task}",
            f"{total['norms'][task]:.4g}",
            f"{100 * total['norms'][task] / (total['base_norm'] or 1):.2f}",
            f"{100 * total['outvoted'][task]:.1f}",
            *(f"{total['cosines'][task][other]:z.3f}" for other in shown),
        )
        for index, task in enumerate(total["norms"], 1)
    ]
    names = [f"cos {index}" for index in range(1, len(shown) + 1)]
    return Rows(("task vector", "norm", "% of base", "% outvoted", *names), rows, (0,))


def block_rows(content: Mapping[str, Any], prefix: str) -> Rows:
    """The task vectors by block, with means over the experts. `prefix`: of names, which is left out."""
    rows = [
        (
            own["block"].removeprefix(prefix),
            f"{sum(own['norms'].values()) / len(own['norms']):.3g}",
            _cosine(own),
            f"{100 * own['sign_conflicts']:.1f}",
            f"{mean(own['trimmed']):.1f}",
            f"{mean(own['outvoted']):.1f}",
        )
        for own in content["blocks"]
    ]
    return Rows(("block", "norm", "cosine", "% conflicts", "% trimmed", "% outvoted"), rows, (0,))


def tensor_rows(tensors: Sequence[Mapping[str, Any]]) -> Rows:
    """The task vectors by tensor, with means over the experts."""
    rows = [
        (
            own["tensor"],
            f"{own['norm']:.3g}",
            f"{100 * own['norm'] / (own['base_norm'] or 1):.2f}",
            _cosine(own),
            f"{100 * own['sign_conflicts']:.1f}",
            f"{100 * own['trimmed']:.1f}",
            f"{100 * own['outvoted']:.1f}",
        )
        for own in tensors
    ]
    return Rows(("tensor", "norm", "% of base", "cosine", "% conflicts", "% trimmed", "% outvoted"), rows, (0,))


def _cosine(own: Mapping[str, Any]) -> str:
    return "" if own["cosine"] is None else f"{own['cosine']:z.3f}"


def common_prefix(names: Sequence[str]) -> str:
    """The segments, each with its dot, that all names of layers begin with."""
    parts = [name.split(".")[:-1] for name in names if "." in name]
    same = takewhile(lambda segments: len(set(segments)) == 1, zip(*parts, strict=False))
    return "".join(f"{segments[0]}." for segments in same)
