"""Drawings of matplotlib as inline SVG: text stays text, colours are those of the page, light or dark.

A figure is drawn twice, for wide and for narrow screens, so that its text keeps its size on a phone. matplotlib is
imported only when one is drawn.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 720, 340
"""Widths in pixels."""
HEAT = tuple(f"#0e0f{level:02x}" for level in range(9))
"""Placeholders of the steps of a colour scale, from little to much."""
COLOURS = {
    "ink": "#0e0e01",
    "muted": "#0e0e02",
    "line": "#0e0e03",
    "accent": "#0e0e04",
    "paper": "#0e0e05",
    "soft": "#0e0e06",
    **{f"heat-{level}": colour for level, colour in enumerate(HEAT)},
}
"""Unique placeholder of each colour; in the SVG, the CSS variable of the same name takes its place."""
VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
INK, MUTED, LINE, ACCENT, PAPER, SOFT = (COLOURS[name] for name in ("ink", "muted", "line", "accent", "paper", "soft"))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "epmq",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
}
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
DRAWN = ("style", "fill", "stroke")
"""The attributes that hold colours."""

Draw = Callable[[int], "Figure"]


def figure(name: str, title: str, description: str, draw: Draw) -> Markup:
    """The figure for wide and for narrow screens; the page shows one of them. `draw`: makes it for a width in pixels.
    `name`: unique in the page, of letters. `title` and `description` are read by screen readers."""
    parts = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        svg = _inline(_drawn(draw, width), f"{name}-{kind}", title, description)
        parts.append(Markup('<div class="figure {}">{}</div>').format(kind, Markup(svg)))
    return Markup("").join(parts)


def canvas(width: float, height: float) -> Figure:
    """An empty figure; one point is one pixel."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the upper left corner, without a frame."""
    whole_width, whole_height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(box, facecolor="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def label(axes: Axes, text: str, line: float, offset: float, **style: Any) -> None:
    """Writes a text at a height in data units, so many pixels right of the axes' left edge."""
    at, kind = (0, line), ("axes fraction", "data")
    axes.annotate(text, at, (offset, 0), kind, "offset points", va="center", annotation_clip=False, **style)


def shortened(text: str, width: float) -> str:
    """The text, cut in the middle if it is wider than so many pixels."""
    most = max(4, int(width / 6.6))
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: (most + 1) // 2 - 1]}…{text[len(text) - most // 2 :]}"


def gutter(labels: list[str], width: int) -> float:
    """The pixels that the labels at the left take, at most a third of the figure."""
    return min(max((len(label) for label in labels), default=0) * 6.8 + 14, width * 0.34)


@contextmanager
def style() -> Iterator[None]:
    """The style of all drawings inside the context."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports caches of fonts
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc changes nothing
        matplotlib.rcParams.update(STYLE)
        yield


def _drawn(draw: Draw, width: int) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with style():
        made, file = draw(width), io.StringIO()
        FigureCanvasSVG(made).print_svg(file, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return file.getvalue()


def _inline(text: str, name: str, title: str, description: str) -> str:
    """The SVG as an element of a page: with title, description and colours of the page, without ids of its own."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(text)
    parents = {child: parent for parent in root.iter() for child in parent}
    for child, parent in parents.items():
        if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
            parent.remove(child)
    used = set(re.findall(r"(?:href=\"#|url\(#)([\w-]+)", text))
    for element in root.iter():
        _adapt(element, used, name)
    for tag, content in (("desc", description), ("title", title)):
        child = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        child.text = content
        root.insert(0, child)
    for attribute in ("version", "width", "height"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, used: set[str], name: str) -> None:
    """Replaces placeholder colours and fonts, and makes ids unique in the page."""
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.set("id", f"{name}-{identity}")
    for key, value in element.attrib.items():
        if key in DRAWN:
            for placeholder, variable in VARIABLES.items():
                value = value.replace(placeholder, variable)
            value = re.sub(r"(font: [^;]*?px) [^;]*", r"\1 var(--sans)", value)
            value = re.sub(r"font-family: [^;]*", "font-family: var(--sans)", value)
        value = re.sub(r"url\(#", f"url(#{name}-", value)
        if key in ("href", f"{{{XLINK}}}href"):
            value = value.replace("#", f"#{name}-", 1)
        element.set(key, value)
