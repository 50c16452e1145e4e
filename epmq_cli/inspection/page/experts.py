"""Sections about experts and their base: cosines, and maps of norms, conflicts of signs, and what TIES would drop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from epmq_cli.inspection import sentences
from epmq_cli.inspection.page.section import Section
from epmq_cli.inspection.rows import Rows, model_rows, tensor_rows, vector_rows
from epmq_cli.report.page import svg
from epmq_cli.report.page.heat_map import Cell, Level, by_stack, heat_map, linear, logarithmic, matrix


@dataclass(frozen=True)
class Map:
    """A heat map by block and linear. `said`: with the density of TIES as {density}. `value`: in %, of a tensor's
    numbers. `level`: the scale of its colours."""

    name: str
    heading: str
    said: str
    value: Callable[[Mapping[str, Any]], float]
    level: Callable[[Sequence[float]], Level]


MAPS = (
    Map(
        "norms",
        "Norms of task vectors",
        "The norm of the task vectors in % of the norm of the base, the mean over the experts. Blocks are columns; "
        "colours are on a logarithmic scale.",
        lambda own: 100 * own["norm"] / (own["base_norm"] or 1),
        logarithmic,
    ),
    Map(
        "conflicts",
        "Sign conflicts",
        "Elements whose task vectors have both signs, in % of those that an expert changes.",
        lambda own: 100 * own["sign_conflicts"],
        linear,
    ),
    Map(
        "dropped",
        "What TIES would drop",
        "Elements that TIES trims or outvotes with merge.density={density:g}, in % of those that an expert changes, "
        "the mean over the experts.",
        lambda own: 100 * (own["trimmed"] + own["outvoted"]),
        linear,
    ),
)


def vectors(content: Mapping[str, Any]) -> Section | None:
    """The task vectors as a table, with their cosines as a matrix; None unless the tensors were read."""
    own = content.get("task_vectors")
    if not own:
        return None
    tasks, table = list(content["experts"]), vector_rows(own, list(content["experts"]))
    if len(tasks) < 2:
        return Section("Task vector", tables={"Task vector": table})
    cosines = own["total"]["cosines"]
    pairs = {
        (row, column): cosines[one][other]
        for row, one in enumerate(tasks)
        for column, other in enumerate(tasks)
        if row != column
    }
    level = linear([*pairs.values()])
    cells = {place: Cell(value, f"{value:z.2f}") for place, value in pairs.items()}
    names = [f"{number} {task}" for number, task in enumerate(tasks, 1)]
    numbers = [str(number) for number in range(1, len(tasks) + 1)]
    low, high = min(pairs.values()), max(pairs.values())
    figure = svg.figure(
        "cosines",
        "Cosines between task vectors",
        f"From {low:z.2f} to {high:z.2f}; the table below has all.",
        lambda width: matrix(names, numbers, cells, level, width),
    )
    return Section(
        "Cosines between task vectors",
        ["Experts with a cosine near 0 change the base in different directions."],
        scale=(f"{low:z.2f}", f"{high:z.2f}") if high > low else None,
        figure=figure,
        folded={"Norms and cosines as a table": table},
    )


def maps(content: Mapping[str, Any]) -> list[Section]:
    """The heat maps, with the table of their numbers under the last one; none unless the tensors were read."""
    own = content.get("task_vectors")
    rows = [row for row in own["tensors"] if len(row["shape"]) > 1 and row["elements"]] if own else []
    if not own or not rows:
        return []
    found = [_section(chosen, rows, own["density"]) for chosen in MAPS]
    return [*found[:-1], replace(found[-1], folded={"All tensors as a table": tensor_rows(own["tensors"])})]


def _section(chosen: Map, rows: Sequence[Mapping[str, Any]], density: float) -> Section:
    values = {row["tensor"].removesuffix(".weight"): chosen.value(row) for row in rows}
    level = chosen.level([*values.values()])
    named = [{"name": name, "value": value} for name, value in values.items()]
    stacks = by_stack(named, lambda entry: Cell(entry["value"], _digits(entry["value"])))
    low, high = (f"{_digits(choose(values.values()))}%" for choose in (min, max))
    largest = max(values, key=lambda name: values[name])
    figure = svg.figure(
        chosen.name,
        f"{chosen.heading} by block and linear",
        f"From {low} to {high}; the largest is that of {largest}.",
        lambda width: heat_map(stacks, level, width),
    )
    return Section(chosen.heading, [chosen.said.format(density=density)], scale=(low, high), figure=figure)


def _digits(value: float) -> str:
    """A number in % with two digits."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"


def models(content: Mapping[str, Any]) -> Section | None:
    """Base and experts, with the configs that differ; None if they could not be opened."""
    if "models" not in content:
        return None
    table: Rows = model_rows(content)
    return Section("Models", sentences.configs(content["configs"]), tables={"Models": table})
