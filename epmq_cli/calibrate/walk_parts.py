"""The parts of a walk by which its progress is measured: the steps of a section, and the rest of the pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from epmq_cli.families.structure import Linears, Section, Stack
from epmq_cli.runtime.progress import Part


def walk_parts(stacks: Sequence[Stack], solved: Sequence[bool]) -> list[Part]:
    """The parts of a walk in their order. `solved`: whether the steps of each section are solved; otherwise batches
    only run through it."""
    parts, solves = list[Part](), iter(solved)
    for place, stack in enumerate(stacks):
        parts.append(Part(f"{place} stem", 0.0))
        for section in stack.sections:
            parts += _section_parts(place, section, next(solves))
    return parts


def _section_parts(place: int, section: Section, solve: bool) -> Iterator[Part]:
    forward = 1.0
    for step in section.steps if solve else ():
        if isinstance(step, Linears):
            shapes = [section.module.get_submodule(own).get_parameter("weight").shape for own in step.names]
            width, outs = shapes[0][1], sum(shape[0] for shape in shapes)
            forward += 2 * width * outs
            yield Part(f"{place} {width} to {outs}", float(width * (width + 4 * outs)))
        else:
            norm = section.module.get_submodule(step.name)
            width = next((own.numel() for own in norm.parameters()), 1)  # some norms have no weights
            yield Part(f"{place} norm", 4.0 * width**2)
    yield Part(f"{place} rest after {solve}", forward)
