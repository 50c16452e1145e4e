"""Measures how much the errors of a group of linears change the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from epmq_cli.models.weights import copy_into
from epmq_cli.quantize.rtn import rtn

if TYPE_CHECKING:
    from epmq_cli.calibrate.student import Student
    from epmq_cli.quantize.formats.format import NumberFormat


def divergences(
    student: Student,
    groups: Mapping[str, str],
    format: NumberFormat,
    keep_outputs: Callable[[], Callable[[], float]],
) -> dict[str, float]:
    """The divergence of the outputs, by group, with its linears alone rounded to nearest in a format. `groups`: the
    group of each linear. `keep_outputs`: see `MixedPrecision.divergence`. The model stays as it is."""
    divergence, found = keep_outputs(), dict[str, float]()
    for group in dict.fromkeys(groups.values()):
        own = {f"{name}.weight": student.own(f"{name}.weight") for name, other in groups.items() if other == group}
        copy_into(student.model, {name: rtn(x, format, "mse", student.dtype).dequantize() for name, x in own.items()})
        found[group] = divergence()
        copy_into(student.model, own)
    return found
