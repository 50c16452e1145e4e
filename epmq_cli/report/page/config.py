"""The config with what differs from the defaults, and the command and versions that reproduce the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from epmq_cli.config.files import own_folder
from epmq_cli.report.settings import settings


def section(content: Mapping[str, Any]) -> dict[str, Any]:
    """All options; first those that differ from their defaults."""
    rows = settings(content["config"], content["command"])
    return {"changed": [row for row in rows if row.changed], "rows": rows}


def reproduce(content: Mapping[str, Any]) -> dict[str, Any]:
    """The command, the versions and the machine."""
    return {"command": command(content), "environment": content["environment"], "created": content["created"]}


def command(content: Mapping[str, Any]) -> str:
    """The command line of the run, without its folder, which a run does not overwrite."""
    overrides = [override for override in content["overrides"] if not override.lstrip("+").startswith("out=")]
    return shlex.join(["epmq", content["command"], *own_folder(overrides), *overrides])
