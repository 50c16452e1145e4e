"""`epmq list [GROUP | GROUP=OPTION]`: the options of each config group, one for each YAML in conf/, and the
post-processors of merges as those of `merge.post`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection
from pathlib import Path

from rich.table import Table

from epmq_cli.commands.describe import facts, page, posts_page
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.merge.parameters import Parameters, texts_of
from epmq_cli.runtime.console import console

HEADINGS = ("nothing but the models", "calibration samples", "calibration samples and gradients")
"""What options need, in the order of the gallery."""
POST = "merge.post"


def main(arguments: list[str]) -> None:
    """Prints one line for each option, or the page of one option; exits with 1 for an unknown one."""
    parser = argparse.ArgumentParser(prog="epmq list", description="Show the options of each config group.")
    parser.add_argument("group", nargs="?", help="show only this group, or with GROUP=OPTION all about an option")
    parser.add_argument("--config-dir", type=Path, help="a folder with your own configs, as in epmq run")
    chosen = parser.parse_args(arguments)
    folders = [conf_dir()] + ([chosen.config_dir] if chosen.config_dir else [])
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"epmq: --config-dir {folder} is not a folder")
    groups = options(folders)
    group, _, option = (chosen.group or "").partition("=")
    if group and group not in (*groups, POST):
        sys.exit(f"epmq: unknown group {group!r}; the groups are {', '.join(groups)}")
    names = _posts() if group == POST else groups.get(group, {})
    if option and option not in names:
        near = difflib.get_close_matches(option, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; see epmq list {group}"
        sys.exit(f"epmq: {group} has no option {option!r}{hint}")
    if group == POST:
        print(posts_page(option))
    elif option:
        print(page(group, option, _file(folders, group, option)))
    elif group:
        show_gallery(group, groups[group], folders)
        if group == "merge":
            console.print("\nparameters of most methods, as their pages show", style="bold", highlight=False)
            show_rows([(f"merge.{name}", text) for name, text in texts_of(Parameters).items()])
    else:
        show(groups)


def _posts() -> Collection[str]:
    from epmq_cli.merge.post import POSTS  # imports torch

    return POSTS


def _file(folders: list[Path], group: str, option: str) -> Path:
    return next(path for folder in folders if (path := folder / group / f"{option}.yaml").is_file())


def show_gallery(group: str, summaries: dict[str, str], folders: list[Path]) -> None:
    """Prints the options of a group under headings by what they need, if their configs say so."""
    kinds: dict[str, dict[str, str]] = {}
    for option, text in summaries.items():
        lines = _file(folders, group, option).read_text(encoding="utf-8").splitlines()
        kinds.setdefault(facts(lines).get("needs", ""), {})[option] = text
    for kind, part in sorted(kinds.items(), key=lambda item: HEADINGS.index(item[0]) if item[0] in HEADINGS else 9):
        if kind:
            console.print(f"\nneeds {kind}", style="bold", highlight=False)
        show({group: part})


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
    show_rows([(f"{group}={name}", text) for group, summaries in groups.items() for name, text in summaries.items()])


def show_rows(rows: list[tuple[str, str]]) -> None:
    """Prints a table of names and texts as `show` does."""
    if not console.is_terminal:
        for name, text in rows:
            print(f"{name:<32} {text}".rstrip(), flush=True)  # what is flushed stays unwritten for exit_on_error
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
