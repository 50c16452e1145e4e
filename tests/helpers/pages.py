"""The pages of the documentation and the README: their blocks of code, and their commands.

A block is fenced, with its language and maybe a title. A title such as `needs the hub` or `takes minutes` says why the
block is not run here; any other title is the name of a file with that text.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.S | re.M)
MARKS = {
    *("needs the hub", "needs the network", "needs a GPU", "needs a cluster", "needs vLLM"),
    "needs llama.cpp",
    *("needs the extra joblib", "needs an extra", "needs your models", "takes minutes"),
}
"""The titles of blocks that are not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    title: str
    text: str

    @property
    def marked(self) -> bool:
        """Whether the block needs more than a test has."""
        return self.title.startswith(("needs ", "takes "))

    @property
    def is_file(self) -> bool:
        """Whether the block is a file."""
        return bool(self.title) and not self.marked

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments and continuation lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := without_comment(line))]


@dataclass(frozen=True)
class Page:
    """A page by its path in the repository."""

    name: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        """The blocks in their order."""
        return [Block(kind, title, text) for kind, title, text in FENCE.findall(self.text)]

    @property
    def is_story(self) -> bool:
        """Whether the commands of the page need its files, so that they run in their order in one folder."""
        return any(block.is_file for block in self.blocks)


def without_comment(line: str) -> str:
    """A command without its comment."""
    return re.sub(r"(^|\s{2,})#.*", "", line).strip()


def words(command: str) -> list[str]:
    """The words of a command; `eval "$(...)"` counts as the command inside."""
    inner = re.fullmatch(r'eval "\$\((.*)\)"', command)
    return shlex.split(inner[1] if inner else command)


def pages() -> list[Page]:
    """The README and every page of the documentation."""
    return [Page(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in PATHS]


def plain_commands() -> list[str]:
    """The commands that need no file of their page, each once."""
    blocks = [block for page in pages() if not page.is_story for block in page.blocks if not block.marked]
    return list(dict.fromkeys(command for block in blocks if block.language == "bash" for command in block.commands))


QUICK = ["calib.samples=8", "eval.samples=4", "eval.stages=[quantized]"]
SHORTER = {
    "refine=distill": "refine.epochs=1",
    "recipe=best": "refine.epochs=1",
    "refine=blocks": "refine.iterations=2",
}
"""Further options of commands that train."""


def short_run() -> list[str]:
    """The options of a run with few samples."""
    return list(QUICK)


def quick(arguments: list[str]) -> list[str]:
    """The arguments of `epmq`, with few samples."""
    if arguments[0] == "run" and not {"--help", "--cfg"} & set(arguments):
        return [*arguments, *QUICK, *(text for word, text in SHORTER.items() if word in arguments)]
    return [*arguments, "eval.samples=4"] if arguments[0] == "eval" else arguments


ANCHOR = re.compile(r"\s*\{#([\w-]+)\}$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    """A text without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.M):
        named = ANCHOR.search(heading)
        plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", ANCHOR.sub("", heading))
        slug = re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip())
        found.add(named[1] if named else slug)
    return found


def linked_texts() -> dict[str, str]:
    """The pages, and the files that are pages too, by their paths."""
    others = ("benchmarks/README.md", "dev/log.md", "SECURITY.md", "CHANGELOG.md")
    return {page.name: page.text for page in pages()} | {
        name: (ROOT / name).read_text(encoding="utf-8") for name in others
    }


def broken_links(texts: dict[str, str], root: Path = ROOT) -> list[str]:
    """The links of texts, by their paths below `root`, that lead to no file or no heading."""
    broken = []
    for name, text in texts.items():
        for link in LINK.findall(without_code(text)):
            target, _, anchor = link.partition("#")
            path = (root / name).parent / target if target else root / name
            if re.match(r"\w+:", link):
                continue
            if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
                broken.append(f"{name}: {link}")
    return broken
