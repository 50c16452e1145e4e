"""What the options of a config group may be, in words: the checks that its class makes, and the types of its fields."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from epmq_cli.config import instantiate
from epmq_cli.config.field_types import described
from epmq_cli.config.validate import noting
from epmq_cli.errors import EpmqError

SETTING = ("suite", "recipe", "experiment", "tracking")
"""Groups whose options are settings of other things, without checks of their own."""


def allowed(group: str, option: str, command: str, own: Path | None) -> dict[str, str]:
    """What each parameter of an option takes, by name. `command`: the first line of its file, with the overrides that
    it needs. `own`: the user's config folder. Empty for a file that cannot be used as it is."""
    if group in SETTING:
        return {}
    given = [part for part in shlex.split(command) if part.startswith((f"{group}.", "suite=", "bits="))]
    path = [f"hydra.searchpath=[file://{own.resolve()}]"] if own else []
    try:
        with initialize_config_dir(str(instantiate.conf_dir()), version_base="1.3"), noting() as notes:
            config = compose("run", overrides=[*path, f"{group}={option}", *given, "out=x"])
            node = config[group]
            kinds = _build(group, node)
    except (EpmqError, HydraException, OmegaConfBaseException):
        return {}
    texts = {}
    for name in node:
        where = instantiate.references(node).get(str(name), f"{group}.{name}")
        text = notes.get(where) or notes.get(f"{group}.{name}") or notes.get(str(name))
        text = _text(text, next((hints[name] for hints in kinds if name in hints), None))
        if text:
            texts[str(name)] = text
    return texts


def _build(group: str, node: DictConfig) -> list[dict[str, Any]]:
    """Builds the object of a group, which checks its options. Returns the types of its fields."""
    from hydra.utils import get_class

    if group == "quant":
        from epmq_cli.quantize.build import build_quantizer
        from epmq_cli.quantize.formats.names import FormatOptions

        build_quantizer(node)
        return [typing.get_type_hints(get_class(node._target_)), typing.get_type_hints(FormatOptions)]
    instantiate.build(group, node)
    return [typing.get_type_hints(get_class(node._target_))]


def _text(text: str | None, hint: Any) -> str:
    """The text of a check, with the other values that the type allows; without a check the type."""
    others = [argument for argument in typing.get_args(hint) if typing.get_origin(argument) or argument is type(None)]
    if text is None:
        return described(hint) if hint is not None and described(hint) not in ("values", "text") else ""
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return f"a list, each {text}"
    words = [described(other) for other in others if typing.get_origin(hint) is not typing.Literal]
    return ", or ".join([text, *words])
