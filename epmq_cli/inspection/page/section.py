"""A section of the page of `epmq inspect`: sentences, a figure and tables. All have the same template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from epmq_cli.inspection.rows import Rows

TEMPLATES = Path(__file__).with_name("templates")
TEMPLATE = "inspected"


@dataclass(frozen=True)
class Share:
    """A part of a whole. `percent`: of its length. `colour`: of the page, by name."""

    name: str
    text: str
    percent: float
    colour: str


@dataclass(frozen=True)
class Section:
    """`figure`: with the least and the largest value of its colours in `scale`. `shares`: a bar of parts. `tables`:
    shown at once, `folded`: behind a line that opens them; both by what they hold. `place`: what comes before these
    names for screen readers."""

    heading: str
    sentences: Sequence[str] = ()
    shares: Sequence[Share] = ()
    scale: tuple[str, str] | None = None
    figure: Markup | None = None
    tables: dict[str, Rows] = field(default_factory=dict)
    folded: dict[str, Rows] = field(default_factory=dict)
    level: int = 2
    place: str = ""

    def of(self, path: str) -> Section:
        """The same under the heading of a path, which screen readers tell with the tables."""
        return replace(self, level=self.level + 1, place=f"{path}: ")
