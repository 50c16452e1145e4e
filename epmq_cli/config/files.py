"""The config files in conf/ and in users' config folders, read as text: their heads say what an option is.

Imports neither Hydra nor omegaconf, which `epmq list` and `epmq --help` would wait for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from epmq_cli.errors import ConfigError

FACTS = ("kind", "formula", "needs", "memory", "experts")
"""The facts that a config may state in comments of its head, such as `# needs: calibration samples`. The first is
the heading under which `epmq list` shows the option; its page shows the others."""
FACT = re.compile(rf"^({'|'.join(FACTS)}): (.*)$")
URL = re.compile(r"https?://[^\s)]*[^\s).,:;]")
UNLINKED = re.compile(rf"(, )?{URL.pattern}")
SENTENCE = re.compile(r"(?<=[.)])\.? (?=[A-Z])|\.$")


def conf_dir() -> Path:
    """The folder of the shipped configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def read_lines(path: Path) -> list[str]:
    """The lines of a config file; ConfigError if it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"a config file cannot be read: {path} is not a file; remove it")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"a config file cannot be read: {path} is not UTF-8 text; save it in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"a config file cannot be read: {path} ({error.strerror}); repair or remove it") from error


class Head(NamedTuple):
    """The comments that a config file opens with: its command line, then its text, in lines, and its facts."""

    command: str
    text: tuple[str, ...]
    facts: dict[str, str]

    @property
    def summary(self) -> str:
        """The first line of the text."""
        return self.text[0].strip() if self.text else ""

    @property
    def short(self) -> str:
        """The first sentence of the text, without links."""
        prose = " ".join(itertools.takewhile(lambda line: not line.startswith(" "), self.text))
        return SENTENCE.split(UNLINKED.sub("", prose).replace(" ()", ""))[0].removesuffix(".")

    @property
    def sources(self) -> list[str]:
        """The links in the text."""
        return list(dict.fromkeys(link for line in self.text for link in URL.findall(line)))


def head_of(lines: list[str]) -> Head:
    """The head of a config file with these lines."""
    comments = []
    for line in lines:
        if line and not line.startswith("#"):
            break
        if line.startswith("#") and not line.startswith("# @"):
            comments.append(line[1:].removeprefix(" "))
    facts = {match[1]: match[2] for line in comments[1:] if (match := FACT.match(line))}
    text = tuple(line for line in comments[1:] if not FACT.match(line))
    return Head(comments[0].strip() if comments else "", text, facts)


def options(folders: list[Path]) -> dict[str, dict[str, Path]]:
    """group -> option -> file, for every YAML one level down; in a group, shipped options come first."""
    groups: dict[str, dict[str, Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, {}).setdefault(path.stem, path)
    return dict(sorted(groups.items()))


def own_folder(overrides: Iterable[str]) -> list[str]:
    """The words `--config-dir FOLDER` if an override chooses an option that is not shipped, else none. The folder's own
    path would say more about a machine than a page should."""
    shipped = options([conf_dir()])
    chosen = (text.lstrip("+").partition("=")[::2] for text in overrides)
    return (
        ["--config-dir", "FOLDER"]
        if any(option not in shipped[group] for group, option in chosen if group in shipped)
        else []
    )
