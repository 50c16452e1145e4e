"""Sections about one path, and about the base of experts: parts, types, bits, and what a run would refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from epmq_cli.inspection import sentences
from epmq_cli.inspection.page.section import Section, Share
from epmq_cli.inspection.roles import HEAD, LEFT, MERGED, QUANTIZED
from epmq_cli.inspection.rows import Rows, checkpoint_rows, part_rows, value_rows
from epmq_cli.inspection.sentences import amount
from epmq_cli.report.page import svg
from epmq_cli.report.page.heat_map import Cell, by_stack, heat_map, linear

COLOURS = {
    QUANTIZED: ("merged and quantized", "accent"),
    MERGED: ("merged", "heat-4"),
    HEAD: ("task heads, kept", "ink"),
    LEFT: ("left as the base has them", "muted"),
}
"""The name and colour of each treatment."""


def refused(content: Mapping[str, Any]) -> Section | None:
    """The reasons for which a run would refuse this; None without one."""
    reasons = content.get("refused")
    return Section("What a run would refuse", reasons) if reasons else None


def parts(content: Mapping[str, Any]) -> Section | None:
    """What a run does with each part of a model; None if no family takes it."""
    if not content.get("parts"):
        return None
    whole = sum(row["parameters"] for row in content["parts"]) or 1
    counts = {kind: sum(row["parameters"] for row in content["parts"] if row["treatment"] == kind) for kind in COLOURS}
    shares = [
        Share(COLOURS[kind][0], amount(count), 100 * count / whole, COLOURS[kind][1])
        for kind, count in counts.items()
        if count
    ]
    section = Section("Parameters by part", shares=shares, tables={"Parameters by part": part_rows(content)})
    names = [*content["left_names"], *([f"and {content['left_more']} more"] if content["left_more"] else [])]
    left = {"Tensors that a run leaves as the base has them": Rows(("tensor",), [(name,) for name in names], (0,))}
    return replace(section, folded=left) if names else section


def types(content: Mapping[str, Any]) -> Section:
    """The types of the numbers of a model."""
    whole = sum(content["types"].values()) or 1
    rows = [(name, amount(count), f"{100 * count / whole:.1f}") for name, count in content["types"].items()]
    return Section("Types of numbers", tables={"Types of numbers": Rows(("type", "parameters", "%"), rows, (0,))})


def adapter(content: Mapping[str, Any]) -> Section | None:
    """Kind, ranks and targets; None for other paths."""
    return Section("Adapter", sentences.adapter(content)) if content["kind"] == "adapter" else None


def checkpoint(content: Mapping[str, Any]) -> Section | None:
    """The quantized linears; None for other paths, and for dense checkpoints."""
    if not content.get("formats"):
        return None
    texts = [sentences.checkpoint(content), *sentences.unquantized(content)]
    formats = {"Formats": checkpoint_rows(content, "formats", "")}
    return Section(
        "Quantized linears", texts, tables=formats, folded={"Layers": checkpoint_rows(content, "layers", "")}
    )


def bits(content: Mapping[str, Any], name: str) -> Section | None:
    """The map of bits of a checkpoint; None if all linears have the same. `name`: of the figure."""
    widths = content.get("bits_by_linear") or {}
    if len(set(widths.values())) < 2:
        return None
    rows = [{"name": linear, "bits": width} for linear, width in widths.items()]
    low, high = min(widths.values()), max(widths.values())
    stacks = by_stack(rows, lambda row: Cell(row["bits"], f"{row['bits']:g}"))
    level = linear([*widths.values()])
    figure = svg.figure(
        name, "Bits by block and linear", f"From {low} to {high} bits.", lambda width: heat_map(stacks, level, width)
    )
    return Section("Bits of each linear", scale=(f"{low} bits", f"{high} bits"), figure=figure)


def values(content: Mapping[str, Any]) -> Section | None:
    """Norms and largest magnitudes by part; None unless the tensors were read."""
    if not content.get("values"):
        return None
    texts = [sentences.not_finite(content["values"])]
    return Section("Values", texts, tables={"Norms by part": value_rows(content["values"])})
