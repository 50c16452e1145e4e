"""Model architectures. A family is one module here with one object in `FAMILIES`."""

from __future__ import annotations

from epmq_cli.errors import ConfigError
from epmq_cli.families.bert import Bert
from epmq_cli.families.clip import Clip
from epmq_cli.families.family import Family
from epmq_cli.families.open_clip import OpenClip

FAMILIES: dict[str, Family] = {"bert": Bert(), "clip": Clip(), "open_clip": OpenClip()}


def family_of(name: str) -> Family:
    """The family of this name; ConfigError names the known ones."""
    if name not in FAMILIES:
        raise ConfigError(f"suite.family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
