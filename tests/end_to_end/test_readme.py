"""Oracle: the README itself. Every command in it runs; every suite in it composes and can be instantiated."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from epmq_cli.commands.arguments import split
from epmq_cli.commands.overrides import check_overrides
from epmq_cli.config.instantiate import build, conf_dir
from tests.conftest import Run
from tests.helpers.tiers import only

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SUITES = [text for kind, text in BLOCKS if kind == "yaml"]
LINES = re.findall(r"^    (epmq (?:.*\\\n)*.*)$", README.read_text(encoding="utf-8"), re.M)
FAST = (
    "epmq run merge=ties quant=gptq bits=4",
    "epmq list",
    "epmq verify runs/NAME/checkpoint --scores",
)
"""The commands of the default tier."""
QUICK = ["calib.samples=8", "eval.samples=4", "eval.stages=[quantized]"]


def test_the_readme_has_commands_and_suites() -> None:
    assert len(COMMANDS) >= 6
    assert len(SUITES) == 2
    assert {*FAST} <= {*COMMANDS}
    assert len(LINES) >= 9
    assert all(command.startswith("epmq ") for command in COMMANDS)


@pytest.mark.parametrize("command", only(FAST, COMMANDS))
def test_every_command_runs(command: str, epmq_inside: Run) -> None:
    arguments = shlex.split(command)[1:]
    if arguments[0] == "run" and "--help" not in arguments:
        arguments += QUICK
    if arguments[0] in ("eval", "inspect", "push", "report", "verify"):
        assert epmq_inside("run", *QUICK, "out=runs/NAME").returncode == 0
        arguments += ["eval.samples=4"] if arguments[0] == "eval" else []
    result = epmq_inside(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("line", LINES)
def test_commands_that_need_models_or_engines_can_be_parsed(line: str) -> None:
    command, *arguments = shlex.split(line.replace("\\\n", ""), comments=True)[1:]
    overrides, flags = split(arguments)
    check_overrides(command, overrides)
    assert set(flags) <= {"-m", "--config-dir", "my_configs"}


@pytest.mark.parametrize("text", SUITES, ids=[text.splitlines()[1] for text in SUITES])
def test_every_suite_composes_and_can_be_instantiated(text: str, tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text(text)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=[f"hydra.searchpath=[file://{tmp_path}]", "suite=mine", "out=x"])
    suite = build("suite", cfg.suite)
    assert len(suite.members) == 2
