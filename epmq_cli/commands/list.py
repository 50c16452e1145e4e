"""`epmq list [GROUP]`: the options of each config group, one for each YAML in conf/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.runtime.console import console


def main(arguments: list[str]) -> None:
    """Prints one line for each option; exits with 1 for an unknown group."""
    parser = argparse.ArgumentParser(prog="epmq list", description="Show the options of each config group.")
    parser.add_argument("group", nargs="?", help="show only this group")
    parser.add_argument("--config-dir", type=Path, help="a folder with your own configs, as in epmq run")
    chosen = parser.parse_args(arguments)
    folders = [conf_dir()] + ([chosen.config_dir] if chosen.config_dir else [])
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"epmq: --config-dir {folder} is not a folder")
    groups = options(folders)
    if chosen.group is not None and chosen.group not in groups:
        sys.exit(f"epmq: unknown group {chosen.group!r}; the groups are {', '.join(groups)}")
    show({chosen.group: groups[chosen.group]} if chosen.group else groups)


def options(folders: list[Path]) -> dict[str, dict[str, str]]:
    """group -> option -> summary, for every YAML one level down; in a group, shipped options come first."""
    groups: dict[str, dict[str, str]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, {}).setdefault(path.stem, summary(path))
    return dict(sorted(groups.items()))


def summary(path: Path) -> str:
    """The second comment line of a config, its summary; the first is its command line."""
    if not path.is_file():
        raise ConfigError(f"a config file cannot be read: {path} is not a file; remove it")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"a config file cannot be read: {path} is not UTF-8 text; save it in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"a config file cannot be read: {path} ({error.strerror}); repair or remove it") from error
    comments = [line[1:].strip() for line in lines if line.startswith("#") and not line.startswith("# @")]
    return comments[1] if len(comments) > 1 else ""


def show(groups: dict[str, dict[str, str]]) -> None:
    """Prints a table as wide as the terminal; without a terminal one line for each option."""
    rows = [(f"{group}={option}", text) for group, summaries in groups.items() for option, text in summaries.items()]
    if not console.is_terminal:
        print("\n".join(f"{name:<32} {text}".rstrip() for name, text in rows))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
