"""The number of layers in a config."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from epmq_cli.errors import ModelError

COUNTS = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth|num_(en|de)coder_layers|(en|de)coder_layers")
"""Keys of configs with a number of layers."""


def with_layers(config: dict[str, Any], stack: str, count: int, origins: list[int]) -> dict[str, Any]:
    """A config with another number of layers in a stack, and lists over its layers to match. ModelError if no key
    holds the number."""
    if origins == list(range(count)):
        return config
    config = copy.deepcopy(config)
    sections = [("", config), *((name, value) for name, value in config.items() if isinstance(value, dict))]
    found = [(name, section, key) for name, section in sections for key in section if _counts(key, section, count)]
    words = [word for word in ("decoder", "encoder", "vision", "text") if word in stack]
    named = [each for each in found if any(word in each[0] or word in each[2] for word in words)]
    _, section, key = (named or found or [("", {}, None)])[0]
    if key is None:
        raise ModelError(f"base: config.json has no key with the {count} layers of {stack}, so they cannot be changed")
    section[key] = len(origins)
    for name, value in section.items():
        if isinstance(value, list) and len(value) == count:
            section[name] = [value[index] for index in origins]
    if "decoder" in stack and key == "num_layers":
        section["num_decoder_layers"], section["num_layers"] = len(origins), count
    return config


def _counts(key: str, section: Mapping[str, Any], count: int) -> bool:
    return COUNTS.fullmatch(key) is not None and section[key] == count
