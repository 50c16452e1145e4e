"""`epmq list [GROUP | GROUP=OPTION]`: the options of each config group, one for each YAML in conf/, and the
post-processors of merges as those of `merge.post`.

It prints plain lines without rich, imports no YAML library and other modules only where it uses them, so that the list
appears at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from epmq_cli.config.files import Head, conf_dir, head_of, options, read_lines
from epmq_cli.runtime.imports import import_lazily

GROUPS = {
    "suite": "base, experts and tasks",
    "merge": "how the experts become one model",
    "guidance": "what each layer is fitted to",
    "refine": "training beyond what layers reach one by one",
    "calib": "the samples that are read",
    "quant": "how weights are rounded",
    "pack": "the format of the checkpoint",
    "eval": "what is scored",
    "tracking": "where runs are recorded beside their folder",
    "recipe": "methods for people in a hurry",
    "experiment": "published results, each with its suite and methods",
}
"""The config groups in their order, with what they are."""
KINDS = {
    "suite": ("built in", "published", "your models"),
    "merge": (
        *("means", "on the sphere", "task vectors", "singular vectors, least squares"),
        *("calibration samples", "calibration samples and gradients", "others"),
    ),
}
"""The kinds of options that the heads of their files state (`# kind:`), in their order."""
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
    if group:
        import_lazily("torch")  # pages need its name only
    names: Collection[str] = _posts() if group == POST else groups.get(group, {})
    if option and option not in names:
        import difflib

        near = difflib.get_close_matches(option, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; see epmq list {group}"
        sys.exit(f"epmq: {group} has no option {option!r}{hint}")
    if group == POST:
        from epmq_cli.commands.describe import posts_page

        print(posts_page(option))
    elif option:
        from epmq_cli.commands.describe import page

        print(page(group, option, groups[group][option], chosen.config_dir))
    else:
        show(groups, [group] if group else sorted(groups, key=_place))


def _posts() -> Collection[str]:
    from epmq_cli.merge.post import POSTS

    return POSTS


def _place(group: str) -> int:
    return list(GROUPS).index(group) if group in GROUPS else len(GROUPS)


def show(groups: dict[str, dict[str, Path]], chosen: Sequence[str]) -> None:
    """Prints the options of the chosen groups under headings, one line each, and where to read on."""
    lines = [line for group in chosen for line in _group(group, groups[group])]
    if list(chosen) == ["merge"]:
        from epmq_cli.merge.parameters import Parameters, texts_of  # imports omegaconf

        lines += ["", _bold("parameters of most methods, as their pages show")]
        lines += _lines({f"merge.{name}": text for name, text in texts_of(Parameters).items()})
    group = chosen[0] if len(chosen) == 1 else "merge"
    first = next(iter(groups[group]))
    lines += ["", *_lines({f"epmq list {group}={first}": "all about one option: parameters, sources, an example"})]
    for line in lines:
        print(line, flush=True)  # what is flushed stays unwritten for exit_on_error


def _group(group: str, paths: dict[str, Path]) -> Iterator[str]:
    """The lines of a group."""
    heads = {option: head_of(read_lines(path)) for option, path in paths.items()}
    yield from ("", _bold(f"{group}: {GROUPS.get(group, 'your own group')}"))
    for kind, part in _by_kind(group, heads).items():
        yield from [f"  {kind}"] if kind else []
        yield from _lines({f"{group}={option}": head.short for option, head in part.items()}, max(map(len, heads)))


def _by_kind(group: str, heads: dict[str, Head]) -> dict[str, dict[str, Head]]:
    """The options by kind, those without one last."""
    order = KINDS.get(group, ())
    kinds: dict[str, dict[str, Head]] = {kind: {} for kind in order}
    for option, head in heads.items():
        kinds.setdefault(head.facts.get("kind", ""), {})[option] = head
    return {kind: part for kind, part in kinds.items() if part}


def _bold(text: str) -> str:
    styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[1m{text}\033[0m" if styled else text


def _lines(texts: dict[str, str], width: int = 0) -> list[str]:
    """A line for each name, on a terminal no wider than that. `width`: of the longest option of the group."""
    width = max(width and width + next(iter(texts)).index("=") + 1, *map(len, texts))
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in texts.items()]
    if not sys.stdout.isatty():
        return lines
    import shutil

    columns = shutil.get_terminal_size().columns
    return [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in lines]
