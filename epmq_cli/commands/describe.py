"""`epmq list GROUP=OPTION`: one option with its facts, its parameters and what they take."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

WIDTH = 120
FACTS = ("formula", "needs", "memory", "experts")
"""The facts that a config may state in comments of its head, such as `# needs: calibration samples`."""
FACT = re.compile(rf"^# ({'|'.join(FACTS)}): (.*)$")
PER_TENSOR = """\
per tensor: also a list of numbers over the layers, such as [0.2, 0.8], or rules by a part of the tensor's name, such as
[{filter: mlp, value: 0.5}, {value: 1}]; per expert: also a mapping such as {TASK: 0.5}"""
VALUE = re.compile(r"^(\w+): *([^#]*?) *(?:# *(.*))?$")


def facts(lines: list[str]) -> dict[str, str]:
    """The facts in the comments of a config, by name."""
    return {match[1]: match[2] for line in lines if (match := FACT.match(line))}


def page(group: str, option: str, path: Path) -> str:
    """The page of an option: what it is, its facts, its parameters with their defaults, and its command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")]
    prose = [line for line in comments[1:] if not FACT.match(f"# {line}")]
    parts = [f"{group}={option}", fill(" ".join(prose), WIDTH)]
    stated = facts(lines)
    if stated:
        parts.append("\n".join(_item(name, stated[name], 9) for name in FACTS if name in stated))
    values = [match for line in lines if (match := VALUE.match(line)) and match[1] not in ("_target_", "defaults")]
    if values:
        ranges = _ranges(group, lines)
        parts.append("\n".join(["parameters", *_parameters(values, ranges)]))
        if any("per tensor" in takes for takes in ranges.values()):
            parts.append(PER_TENSOR)
    return "\n\n".join([*parts, f"example   {comments[0]}"])


def _item(name: str, text: str, width: int) -> str:
    return fill(text, WIDTH, initial_indent=f"{name:<{width}} ", subsequent_indent=" " * (width + 1))


def _parameters(values: list[re.Match[str]], ranges: dict[str, str]) -> list[str]:
    """The lines of each parameter: its default and what it takes, then what it is."""
    name_width, width = (max(len(match[part]) for match in values) for part in (1, 2))
    lines = []
    for name, default, comment in (match.groups() for match in values):
        texts = [text for text in (ranges.get(name), comment) if text] or [""]
        for index, text in enumerate(texts):
            start = f"  {name if index == 0 else '':<{name_width}}  {default if index == 0 else '':<{width}}  "
            lines.append(fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or start.rstrip())
    return lines


def _ranges(group: str, lines: list[str]) -> dict[str, str]:
    """What the parameters of a merge method take, by name."""
    target = next((line.partition(":")[2].strip() for line in lines if line.startswith("_target_:")), "")
    if group != "merge" or not target:
        return {}
    import hydra

    from epmq_cli.merge.parameters import parameters_of

    return {name: str(kind) for name, kind in parameters_of(hydra.utils.get_class(target)).items()}
