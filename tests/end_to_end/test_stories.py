"""Oracle: pages of the documentation that have files. A test writes the files of a page into an empty folder and runs
its commands and its Python in their order, as a reader does."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from tests.faults.driver import forked, run_epmq
from tests.helpers import minihub
from tests.helpers.pages import Page, pages, quick, short_run, words

STORIES = {page.name: page for page in pages() if page.is_story}


def reviews(folder: Path, request: pytest.FixtureRequest) -> None:
    """The models and data of README.md."""
    hub: Path = request.getfixturevalue("bert_hub")
    names = {"base": "base", "first": "films", "second": "books"}
    for source, name in names.items():
        shutil.copytree(hub / source, folder / "models" / name)
    (folder / "data").mkdir()
    for source, name in list(names.items())[1:]:
        for split in ("train", "test"):
            shutil.copy(hub / f"{source}_{split}.tsv", folder / "data" / f"{name}_{split}.tsv")


def birds_and_cars(folder: Path, request: pytest.FixtureRequest) -> None:
    """The models and data of docs/suites.md."""
    hub: Path = request.getfixturevalue("clip_hub")
    for source, name in {"base": "clip_base", "first": "clip_birds", "second": "clip_cars"}.items():
        shutil.copytree(hub / source, folder / "models" / name)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("robin", "heron", "kite"):
            place = folder / "data" / "birds" / split / label
            place.mkdir(parents=True)
            for number in range(6):
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    arrays = {
        f"{split}_images": generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8) for split in ("train", "test")
    }
    arrays |= {f"{split}_labels": np.arange(12) % 2 for split in ("train", "test")}
    np.savez(folder / "data" / "cars.npz", **arrays)


def llamas(folder: Path, request: pytest.FixtureRequest) -> None:
    """The models of docs/coming-from-mergekit.md; with data, those of docs/recipes/mergekit.md."""
    made = minihub.build(request.getfixturevalue("tmp_path_factory").mktemp("llama"), "llama")
    for source, name in {"base": "base", "first": "math", "second": "code"}.items():
        shutil.copytree(made / source, folder / "models" / name)
    (folder / "data").mkdir()
    for source, name in {"first": "math", "second": "code"}.items():
        for split in ("train", "test"):
            shutil.copy(made / f"{source}_{split}.jsonl", folder / "data" / f"{name}_{split}.jsonl")


STAGES: dict[str, Callable[[Path, pytest.FixtureRequest], None]] = {
    "README.md": reviews,
    "docs/suites.md": birds_and_cars,
    "docs/coming-from-mergekit.md": llamas,
    "docs/recipes/mergekit.md": llamas,
}
"""What a reader has before he reads a page."""


class Reader:
    """Follows a page in a folder."""

    def __init__(self, folder: Path, miniature: bool) -> None:
        self.folder, self.ran, self.port = folder, 0, _free_port()
        self.options = ["group_size=32"] if miniature else []  # widths of miniature models are multiples of 32
        self.servers: list[multiprocessing.process.BaseProcess] = []

    def follow(self, page: Page) -> None:
        """Writes the files of the page and runs its blocks in their order."""
        for block in page.blocks:
            if block.is_file:
                path = self.folder / block.title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.language == "python":
                assert forked(partial(self._python, block.text)) == 0, block.text
                self.ran += 1
            elif block.language == "bash" and not block.marked:
                for command in block.commands:
                    self.run(command)

    def run(self, command: str) -> None:
        """Runs one command of the kinds that pages have."""
        program, *arguments = words(command)
        if program == "epmq":
            options = self.options if arguments[0] == "run" else []
            done = run_epmq(self.folder, *quick([*arguments, *options]))
            assert done.returncode == 0, f"{command}: {done.stderr}"
        elif program == "python" and arguments[-1] == "&":
            target = partial(self._script, [arguments[0], str(self.port)])
            self.servers.append(multiprocessing.get_context("fork").Process(target=target, daemon=True))
            self.servers[-1].start()
        elif program == "python":
            assert forked(partial(self._script, arguments)) == 0, command
        elif program == "curl":
            assert _posted(self.port, arguments[arguments.index("-d") + 1]).startswith("boil the ")
        else:
            assert program == "pytest", command
            assert forked(partial(self._tests, arguments[0])) == 0, command
        self.ran += 1

    def _inside(self) -> None:
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))

    def _python(self, text: str) -> None:
        self._inside()
        exec(compile(text, "page", "exec"), {"__name__": "page"})

    def _script(self, arguments: list[str]) -> None:
        self._inside()
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")

    def _tests(self, name: str) -> None:
        self._inside()
        tests = [value for key, value in runpy.run_path(name).items() if key.startswith("test_")]
        assert tests
        for test in tests:
            test()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _posted(port: int, text: str) -> str:
    """The answer of a server that may still be starting."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", text.encode(), timeout=60) as answer:
                found: str = answer.read().decode()
                return found
        except URLError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@contextmanager
def reading(folder: Path, miniature: bool) -> Iterator[Reader]:
    """A reader, whose servers end with the block."""
    reader = Reader(folder, miniature)
    try:
        yield reader
    finally:
        for server in reader.servers:
            server.kill()
            server.join()


def test_there_are_stories_with_known_stages() -> None:
    assert {*STAGES} < {*STORIES}
    assert len(STORIES) >= 8
    titles = [block.title for page in STORIES.values() for block in page.blocks if block.is_file]
    assert all(re.fullmatch(r"[\w/]+\.(py|yaml|yml)", title) for title in titles)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT reads
@pytest.mark.parametrize("name", STORIES)
def test_a_reader_can_follow_the_page(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # for modules that configs of the page name
    page = STORIES[name]
    if name in STAGES:
        STAGES[name](tmp_path, request)
    if "runs/NAME" in page.text:
        assert run_epmq(tmp_path, "run", *short_run(), "out=runs/NAME").returncode == 0
    with reading(tmp_path, miniature=name in STAGES) as reader:
        reader.follow(page)
    assert reader.ran
