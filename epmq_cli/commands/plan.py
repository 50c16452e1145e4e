"""`epmq run --plan`: composes the config of a run and plans it, without a run folder."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from epmq_cli.commands.arguments import split
from epmq_cli.commands.hydra_app import quiet_libraries, tell_loading
from epmq_cli.commands.mergekit import replaced
from epmq_cli.commands.overrides import addable, check_overrides
from epmq_cli.config.instantiate import conf_dir, refuse_tokens
from epmq_cli.errors import ConfigError
from epmq_cli.runtime.exit_status import MISTAKEN

FOLDERS = ("--config-dir", "-cd")
FORMATS = ("table", "json")


def main(arguments: list[str]) -> None:
    """Prints the plan, or writes it as JSON with `--format json`. Exits with 1 if the run would be refused."""
    arguments, format = _format(arguments)
    refuse_tokens(arguments)
    overrides, flags = split([part for text in arguments for part in _parted(text)])
    folders = [value for flag, value in pairwise(flags) if flag in FOLDERS]
    others = [flag for flag in flags if flag not in (*FOLDERS, *folders)]
    if others:
        raise ConfigError(f"epmq run --plan plans one run and takes --config-dir and --format, got {others[0]}")
    overrides = replaced("run", overrides)
    check_overrides("run", overrides)
    cfg = _composed(addable(overrides), folders)
    tell_loading()
    quiet_libraries()
    from epmq_cli.inspection.plan import plan_content, show_plan

    content = plan_content(cfg)
    if format == "json":
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        show_plan(content)
    if content["refused"]:
        sys.exit(MISTAKEN)


def _parted(text: str) -> list[str]:
    """`--config-dir=FOLDER` as two arguments."""
    flag, equals, value = text.partition("=")
    return [flag, value] if flag in FOLDERS and equals else [text]


def _format(arguments: list[str]) -> tuple[list[str], str]:
    """The arguments without `--format`, and its value."""
    rest, format = list[str](), FORMATS[0]
    texts = iter(arguments)
    for text in texts:
        if text.partition("=")[0] == "--format":
            format = text.partition("=")[2] or next(texts, "")
        else:
            rest.append(text)
    if format not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    return rest, format


def _composed(overrides: list[str], folders: list[str]) -> DictConfig:
    """The config of a run, as Hydra composes it."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder")
    paths = ",".join(f"file://{Path(folder).resolve()}" for folder in folders)
    search = [f"hydra.searchpath=[{paths}]"] if folders else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("run", overrides=[*overrides, *search])
