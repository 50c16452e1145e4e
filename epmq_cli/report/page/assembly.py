"""Puts pages together: one self-contained HTML file out of sections, which needs neither scripts nor a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from epmq_cli.runtime.console import plain

Content = TypeVar("Content")
Filled = tuple[str, Mapping[str, Any]]
"""A section: the name of its template, and the values in it."""

TEMPLATES = Path(__file__).with_name("templates")


def filled(sections: Mapping[str, Callable[[Content], Mapping[str, Any] | None]], content: Content) -> Iterator[Filled]:
    """Those of the sections that have something to show of the content. `sections`: functions by template."""
    for name, section in sections.items():
        values = section(content)
        if values is not None:
            yield name, values


def assembled(title: str, sentence: str, sections: Iterable[Filled], own: Path | None = None) -> str:
    """The page. `own`: a folder with further templates."""
    environment = templates(own)
    bodies = [Markup(environment.get_template(f"{name}.html").render(**values)) for name, values in sections]
    return environment.get_template("page.html").render(title=title, sentence=sentence, sections=bodies) + "\n"


@cache
def templates(own: Path | None = None) -> Environment:
    """The templates; they escape every value that is not markup."""
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, *([own] if own else [])]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    return environment
