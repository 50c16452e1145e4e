"""The values of a config file as rows of its page."""

from __future__ import annotations

import re

Row = tuple[str, str, str]
"""A parameter's name, its default and its comment."""
VALUE = re.compile(r"^( *)([\w.*-]+): *((?:[^#]|(?<! )#)*?) *(?:# *(.*))?$")
OVERRIDE = re.compile(r"^  - override /(\w+): (\w+)$")
PART = re.compile(r"^  - (\w+)@(?:(\w+)\.)?([\w-]+)(?:: [\w-]+)?$")
BASE = re.compile(r"^  - (?!_self_)(\w+)$")
HIDDEN = ("_target_", "defaults", "name")


def rows_of(group: str, lines: list[str]) -> list[Row]:
    """The values of a config file with these lines, in their order, nested ones by their full keys. A suite's tasks are
    one row with their names."""
    rows, tasks = _composed(lines), [match[3] for line in lines if (match := PART.match(line)) and match[2] == "tasks"]
    path: list[tuple[int, str]] = []
    for line in lines:
        match = VALUE.match(line)
        if line.startswith("#") or match is None or match[2] in HIDDEN:
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3], match[4] or ""
        path = [*(parent for parent in path if parent[0] < indent), (indent, key)]
        names = [name for _, name in path]
        if group == "suite" and names[0] == "tasks" and not value.startswith(("{}", "???")):
            tasks += names[1:2] if len(names) == 2 else []
        elif value or (comment and indent == 0):
            rows.append((".".join(names), value, comment))
    return [*rows, ("tasks", ", ".join(tasks), "")] if tasks else rows


def _composed(lines: list[str]) -> list[Row]:
    """The rows of the defaults of a config: the options of other groups, and the file that it extends."""
    rows = [(match[1], match[2], "") for line in lines if (match := OVERRIDE.match(line))]
    rows += [("extends", match[1], "") for line in lines if (match := BASE.match(line))]
    parts = [match for line in lines if (match := PART.match(line)) and not match[2]]
    return rows + [(match[3], f"the options of {match[1]}", "") for match in parts]
