"""`epmq list GROUP=OPTION`: one option with its facts, its parameters and what they take."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from textwrap import fill
from typing import Any

from epmq_cli.commands.checked import allowed
from epmq_cli.commands.config_rows import Row, rows_of
from epmq_cli.config.files import FACTS, head_of, read_lines
from epmq_cli.merge.parameters import Parameters, parameters_of, texts_of

WIDTH = 120
INTRODUCTION = """\
Post-processors change the merged tensors of any method, in the order of the list. With options: \
merge.post=[{name: svc, alpha: 0.1}]"""
YAML: dict[Any, str] = {None: "null", (): "[]"}
"""Defaults that YAML writes in another way than Python."""
PER_TENSOR = """\
per tensor: also a list of numbers over the layers, such as [0.2, 0.8], or rules by a part of the tensor's name, such as
[{filter: mlp, value: 0.5}, {value: 1}]; per expert: also a mapping such as {TASK: 0.5}"""
COLUMNS = re.compile(r"\S {2,}\S")
"""Lines with columns keep their form."""


def page(group: str, option: str, path: Path, own: Path | None = None) -> str:
    """The page of an option: what it is, its facts, its parameters with their defaults, its sources and its command.

    `own`: the user's config folder."""
    lines = read_lines(path)
    head = head_of(lines)
    parts = [f"{group}={option}", _prose(head.text)]
    stated = [(name, head.facts[name]) for name in FACTS[1:] if name in head.facts]
    stated += [("source" if index == 0 else "", link) for index, link in enumerate(head.sources)]
    if stated:
        parts.append("\n".join(_item(name, text, 9) for name, text in stated))
    rows = rows_of(group, lines)
    kind = _method(group, lines)
    takes = _ranges(kind) if kind is not object else allowed(group, option, head.command, own)
    rows += _shared(kind)
    if rows:
        parts.append("\n".join(["parameters", *_parameters(rows, takes)]))
        if any("per tensor" in text for text in takes.values()):
            parts.append(PER_TENSOR)
    return "\n\n".join([*(part for part in parts if part), f"example   {head.command}"])


def _prose(text: tuple[str, ...]) -> str:
    """The lines as paragraphs; lines with columns, and indented ones, as they are."""
    parts: list[list[str]] = []
    for line in text:
        table = line.startswith(" ") or COLUMNS.search(line) is not None
        if table or not parts or parts[-1][0].startswith("  "):
            parts.append([f"  {line.removeprefix('  ')}" if table else line])
        else:
            parts[-1].append(line)
    return "\n".join("\n".join(part) if part[0].startswith("  ") else fill(" ".join(part), WIDTH) for part in parts)


def _item(name: str, text: str, width: int) -> str:
    return fill(text, WIDTH, initial_indent=f"{name:<{width}} ", subsequent_indent=" " * (width + 1))


def _parameters(values: list[Row], ranges: dict[str, str]) -> list[str]:
    """The lines of each parameter: its default and what it takes, then what it is."""
    name_width, width = (max(len(row[part]) for row in values) for part in (0, 1))
    lines = []
    for name, default, comment in values:
        texts = [text for text in (ranges.get(name), comment) if text] or [""]
        for index, text in enumerate(texts):
            start = f"  {name if index == 0 else '':<{name_width}}  {default if index == 0 else '':<{width}}  "
            lines.append(fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or start.rstrip())
    return lines


def posts_page(option: str) -> str:
    """The page of a post-processor of merges, or of all of them."""
    from epmq_cli.merge.post import POSTS

    parts = [f"merge.post=[{option}]" if option else "merge.post", fill(INTRODUCTION, WIDTH)]
    for name in [option] if option else POSTS:
        kind = POSTS[name]
        rows = _rows(kind, texts_of(kind))
        parts.append("\n".join([_item(name, kind.summary, 9), *_parameters(rows, _ranges(kind))]))
    return "\n\n".join([*parts, f"example   epmq run merge=ties merge.post=[{option or 'svc'}]"])


def _method(group: str, lines: list[str]) -> type:
    """The class of a merge method; `object` for other options."""
    target = next((line.partition(":")[2].strip() for line in lines if line.startswith("_target_:")), "")
    if group != "merge" or not target:
        return object
    import hydra

    return hydra.utils.get_class(target)


def _ranges(kind: type) -> dict[str, str]:
    """What the parameters of a merge method or post-processor take, by name."""
    return {name: str(takes) for name, takes in parameters_of(kind).items()}


def _shared(kind: type) -> list[Row]:
    """The parameters of a merge method that its file leaves out."""
    return _rows(kind, kind.shared()) if issubclass(kind, Parameters) else []


def _rows(kind: type, texts: dict[str, str]) -> list[Row]:
    """The parameters with these texts, with their defaults as YAML has them."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    return [(name, YAML.get(defaults[name], str(defaults[name])), text) for name, text in texts.items()]
