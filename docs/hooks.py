"""Hooks of mkdocs: pages that are files of the repository, and lists that come from conf/.

A page may link to `../benchmarks/README.md`, which works in the repository; in the built pages the link leads to the
copy of that file. A comment such as <!-- list: options --> in a page becomes the list of that name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from epmq_cli.commands.describe import page
from epmq_cli.config.files import conf_dir, head_of, options, read_lines

ROOT = Path(__file__).parents[1]
COPIES = {
    "benchmarks.md": "benchmarks/README.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "log.md": "dev/log.md",
}
"""Pages that are copies of files, by the page's name."""
PAGES = {source: name for name, source in COPIES.items()}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
LIST = re.compile(r"<!-- list: (\w+) -->")
SHIM = "https://unpkg.com/iframe-worker/shim"
"""What the theme loads so that the search works from the disk; worker.js does the same without another host."""
GROUPS = ("merge", "guidance", "refine", "calib", "quant", "pack", "eval", "suite", "recipe", "experiment", "tracking")
"""The groups in the order of a run."""


def on_files(files: Any, config: Any) -> Any:
    """The files of the documentation with those that are copies."""
    from mkdocs.structure.files import File

    for name, source in COPIES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page with its lists, and with links between pages in place of links between files."""
    name = page.file.src_uri
    return with_lists(linked(markdown, name))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The HTML of a page, which asks no other host."""
    return output.replace(SHIM, posixpath.relpath("worker.js", posixpath.dirname(page.url) or "."))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The HTML of 404.html, likewise."""
    return output.replace(SHIM, "/worker.js")


def source_of(name: str) -> str:
    """The path in the repository of a page's text."""
    return COPIES.get(name, f"docs/{name}")


def linked(markdown: str, name: str) -> str:
    """The text of a page with the links that it has in the built pages."""

    def link(match: re.Match[str]) -> str:
        if re.match(r"\w+:", match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(name)), match[2]))
        built = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if built is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(built, posixpath.dirname(name) or '.')}{match[3]}"

    return LINK.sub(link, markdown)


def with_lists(markdown: str) -> str:
    """The text with a list in place of each comment that names one."""
    return LIST.sub(lambda match: LISTS[match[1]](), markdown)


def option_list() -> str:
    """All options of all groups, each with the page that `epmq list GROUP=OPTION` prints."""
    names, parts = options([conf_dir()]), []
    for group in GROUPS:
        parts.append(f"### {group}\n")
        for option, path in names[group].items():
            text, summary = page(group, option, path), head_of(read_lines(path)).short
            body = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
            title = f"{group}={option}: {summary}".replace('"', "'")
            parts.append(f'??? info "{title}"\n    ```text\n{body}\n    ```\n')
    return "\n".join(parts)


def value_list() -> str:
    """The values of `epmq run` outside of groups, with their defaults, as a table."""
    lines = (conf_dir() / "run.yaml").read_text(encoding="utf-8").splitlines()
    rows = [match for line in lines if (match := re.match(r"(\w+): ([^#]*?) +# (.*)", line))]
    cells = [f"| `{row[1]}` | `{row[2]}` | {escape(row[3], quote=False)} |" for row in rows]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *cells])


def merge_list() -> str:
    """The merge methods with what their configs state, as a table."""
    rows = ["| method | formula | reads | holds in memory |", "|---|---|---|---|"]
    for option, path in options([conf_dir()])["merge"].items():
        stated = head_of(read_lines(path)).facts
        cells = [
            escape(stated.get(name, ""), quote=False).replace("|", "\\|") for name in ("formula", "needs", "memory")
        ]
        rows.append(f"| `{option}` | {' | '.join(cells)} |")
    return "\n".join(rows)


LISTS: dict[str, Callable[[], str]] = {"options": option_list, "values": value_list, "merge": merge_list}
"""The lists by the names that pages use."""
