"""Oracle: README and documentation themselves. Every command in them runs, or has a mark that says what it needs; every
suite composes; every link leads to a page and an anchor that exist. Pages with files: test_stories.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from epmq_cli.commands.arguments import split
from epmq_cli.commands.overrides import check_overrides
from epmq_cli.config.files import options
from epmq_cli.config.instantiate import build, conf_dir
from tests.conftest import Run
from tests.helpers.pages import (
    MARKS,
    ROOT,
    Block,
    anchors,
    broken_links,
    linked_texts,
    pages,
    plain_commands,
    quick,
    short_run,
    without_code,
    words,
)
from tests.helpers.tiers import only

PAGES = {page.name: page for page in pages()}
FAST = (
    "epmq run merge=ties quant=gptq bits=4",
    "epmq list",
    "epmq verify runs/NAME/checkpoint --scores",
)
"""The commands of the default tier."""
GROUPS = {
    "merge": "merge-methods",
    "guidance": "guidance",
    "refine": "refinement",
    "quant": "quantizers",
    "pack": "checkpoint",
    "recipe": "quantizers",
}
"""The pages that name all options of a group."""
SUITES = [
    block.text
    for page in PAGES.values()
    for block in page.blocks
    if block.language == "yaml" and "/suite/" in block.title and "my_family" not in block.text
]


def shell_blocks() -> list[Block]:
    return [block for page in PAGES.values() for block in page.blocks if block.language == "bash"]


def test_the_pages_have_commands_and_known_marks() -> None:
    assert {*FAST} <= {*plain_commands()}
    assert len(plain_commands()) >= 40
    assert {block.title for block in shell_blocks() if block.title} <= MARKS


def test_no_command_hides_outside_of_shell_blocks() -> None:
    hidden = re.compile(r"^( {4}|\t)(epmq|torchrun|python) ", re.M)
    assert [name for name, page in PAGES.items() if hidden.search(without_code(page.text))] == []


def test_every_command_can_be_parsed() -> None:
    count = 0
    for command in (command for block in shell_blocks() for command in block.commands):
        program, *arguments = words(command)
        if program == "epmq" and arguments[0] in ("run", "merge") and "merge=mergekit" not in arguments:
            overrides, _ = split([text for text in arguments[1:] if text != "--from-mergekit" and "=" in text])
            check_overrides(arguments[0], overrides)
            count += 1
    assert count >= 50


def test_the_readme_is_short() -> None:
    text = PAGES["README.md"].text
    assert len(text.splitlines()) <= 125
    assert len(text.split()) <= 900


@pytest.mark.parametrize(("group", "page"), GROUPS.items())
def test_every_option_is_named_on_its_page(group: str, page: str) -> None:
    text = PAGES[f"docs/{page}.md"].text
    assert [option for option in options([conf_dir()])[group] if f"`{option}`" not in text] == []


def test_links_and_anchors_exist() -> None:
    texts = linked_texts()
    assert broken_links(texts) == []
    assert sum(text.count("](") for text in texts.values()) > 100


@pytest.mark.parametrize(
    ("link", "broken"),
    [("b.md", False), ("b.md#a-heading", False), ("b.md#other", True), ("c.md", True), ("https://a.org/c", False)],
)
def test_a_broken_link_is_found(link: str, broken: bool, tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `heading`\n")
    assert bool(broken_links({"a.md": f"[text]({link})"}, tmp_path)) is broken


def test_anchors_are_those_of_mkdocs() -> None:
    pytest.importorskip("mkdocs")
    from markdown.extensions.toc import slugify

    for heading in (
        "Which one?",
        "4-bit inference",
        "`group_size must divide the inputs`",
        "What runs without a network",
    ):
        assert anchors(f"# {heading}\n") == {slugify(heading.replace("`", ""), "-")}


@pytest.mark.parametrize("command", only(FAST, plain_commands()))
def test_every_command_runs(command: str, epmq_inside: Run, tmp_path: Path) -> None:
    program, *arguments = words(command)
    if "runs/NAME" in command:
        assert epmq_inside("run", *short_run(), "out=runs/NAME").returncode == 0
    if program == "torchrun":
        from tests.faults.driver import torchrun

        assert arguments[:4] == ["--nproc-per-node", "2", "-m", "epmq_cli"]
        processes = torchrun(tmp_path, *quick(arguments[4:]), "calib.batch_size=4")  # a batch for each
        assert [done.returncode for done in processes] == [0, 0], [done.stderr for done in processes]
        return
    assert program == "epmq"
    result = epmq_inside(*quick(arguments))
    assert result.returncode == 0, result.stderr
    assert result.stdout or "--quiet" in command


@pytest.mark.parametrize("text", SUITES, ids=[text.splitlines()[1] for text in SUITES])
def test_every_suite_composes_and_can_be_instantiated(text: str, tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text(text)
    given = ["suite.base=base", 'suite.experts="{task}"'] if "base: ???" in text else []  # as a file of mergekit does
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"hydra.searchpath=[file://{tmp_path}]", "suite=mine", "out=x", *given])
    suite = build("suite", cfg.suite)
    assert len(suite.members) == 2


# --- the built pages ------------------------------------------------------------------------------------------------


def test_lists_of_pages_have_every_option_and_value() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    made = hooks.with_lists(PAGES["docs/command-line.md"].text)
    assert "<!-- list" not in made
    found = options([conf_dir()])
    assert [
        f"{group}={option}" for group in hooks.GROUPS for option in found[group] if f'"{group}={option}:' not in made
    ] == []
    assert {*found} - {*hooks.GROUPS} == set()
    for value in ("bits", "budget", "group_size", "transform", "seed", "device", "cache", "data_root", "resume", "out"):
        assert f"| `{value}` |" in made
    table = hooks.with_lists(PAGES["docs/merge-methods.md"].text)
    assert all(f"\n| `{option}` |" in table for option in found["merge"])
    linked = hooks.linked("[a](../benchmarks/README.md#speed) [b](../../SECURITY.md)", "extend/x.md")
    assert linked == "[a](../benchmarks/README.md#speed) [b](../security.md)"
    assert hooks.linked("[a](../benchmarks/README.md#speed)", "x.md") == "[a](benchmarks.md#speed)"
    assert hooks.linked("[a](../docs/x.md)", "benchmarks.md") == "[a](x.md)"


@pytest.mark.slow
def test_the_documentation_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("material")
    import subprocess
    import sys

    build_command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build_command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= 22
    asked = re.compile(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)")
    assert {url for path in built for url in asked.findall(path.read_text(encoding="utf-8"))} == set()
    styles = [
        path
        for path in (tmp_path / "site").rglob("*.css")
        if re.search(r"url\(\s*['\"]?(https?:)?//", path.read_text())
    ]
    assert styles == []


MACHINE = re.compile(r"(?<![\w./>])/(?:home|root|work|tmp|mnt|data|Users|var|opt|usr)/\S+")


def test_the_gallery_is_linked_small_and_names_no_folder_of_a_machine() -> None:
    files = {f"gallery/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs/gallery").iterdir()}
    linked = re.findall(r"\]\((gallery/[^)]*)\)", PAGES["docs/index.md"].text)
    assert sorted(linked) == sorted(files)
    assert {name: MACHINE.findall(text) for name, text in files.items() if MACHINE.search(text)} == {}
    assert all(len(text) < 250_000 for text in files.values())
