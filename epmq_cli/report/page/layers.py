"""The relative loss of each linear, and its bits where they differ, by block and linear."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from epmq_cli.report.page import svg
from epmq_cli.report.page.heat_map import FALLBACK, Cell, by_stack, heat_map, logarithmic
from epmq_cli.runtime.console import plain


def section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The heat map of losses, and the rows of its table; None if no inputs were measured."""
    layers = [layer for layer in content.get("layers", []) if layer["loss"] is not None]
    if not layers:
        return None
    losses = [layer["loss"] for layer in layers]
    worst = max(layers, key=lambda layer: layer["loss"])
    fallen = [layer for layer in layers if layer["fallback"]]
    level = logarithmic(losses)
    stacks = by_stack(layers, lambda layer: Cell(layer["loss"], FALLBACK if layer["fallback"] else ""))
    fell = f" {len(fallen)} of {len(layers)} linears fell back, marked {FALLBACK}." if fallen else ""
    said = f"From {min(losses):.2g} to {max(losses):.2g}; the largest is that of {plain(worst['name'])}.{fell}"
    return {
        "figure": svg.figure("losses", "Relative loss by block and linear", said, partial(heat_map, stacks, level)),
        "low": f"{min(losses):.2g}",
        "high": f"{max(losses):.2g}",
        "worst": worst,
        "fallen": fallen,
        "layers": content["layers"],
    }


def bits_section(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The map of bits, and the losses that chose them; None if all linears have the same and nothing was chosen."""
    layers = [layer for layer in content.get("layers", []) if layer["bits"] is not None]
    widths = sorted({layer["bits"] for layer in layers})
    groups = content.get("sensitivity", [])
    if len(widths) < 2 and not groups:
        return None
    steps = {width: round(1 + 6 * index / max(len(widths) - 1, 1)) for index, width in enumerate(widths)}
    counts = [(width, sum(layer["bits"] == width for layer in layers), f"heat-{steps[width]}") for width in widths]
    stacks = by_stack(layers, lambda layer: Cell(layer["bits"], str(layer["bits"])))
    said = ", ".join(f"{count} linears with {width} bits" for width, count, _ in counts)
    return {
        "figure": svg.figure(
            "bits", "Bits by block and linear", said + ".", partial(heat_map, stacks, lambda value: steps[int(value)])
        ),
        "counts": counts,
        "average": content.get("average_bits"),
        "layers": layers,
        "groups": groups,
        "sizes": {one.get("group_size") for group in groups for one in group["candidates"]},
    }
