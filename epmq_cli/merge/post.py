"""Post-processors, which change the merged tensors of any method: `merge.post=[svc]` or
`merge.post=[{name: svc, alpha: 0.1}]`, applied in the order given. A new one is a row of `POSTS`;
its class has a `summary`, and its fields have texts, for `epmq list merge.post`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from epmq_cli.config.validate import check_keys
from epmq_cli.errors import ConfigError, literal
from epmq_cli.merge.lines import ScaledLayers
from epmq_cli.merge.method import PostProcessor
from epmq_cli.merge.parameters import check_parameters
from epmq_cli.merge.svc import SingularValueCalibration

POSTS: dict[str, type[Any]] = {"lines": ScaledLayers, "svc": SingularValueCalibration}
"""The post-processors by name: dataclasses whose fields declare what they take, as those of methods do."""


def post_processors(where: str, entries: object) -> list[PostProcessor]:
    """The post-processors that a list names. ConfigError if it names an unknown one or a wrong option."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        names = ", ".join(POSTS)
        raise ConfigError(f"{where} must be a list of post-processors, such as [{names}]; got {literal(entries)}")
    return [_post_processor(f"{where}[{index}]", entry) for index, entry in enumerate(entries)]


def _post_processor(where: str, entry: object) -> PostProcessor:
    options = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ConfigError(
            f"{where} must be one of {', '.join(POSTS)}, or one with options such as {{name: svc, alpha: 0.1}}; "
            f"got {literal(entry)}"
        )
    values = {key: value for key, value in options.items() if key != "name"}
    check_keys(where, [options["name"]], POSTS)
    kind = POSTS[options["name"]]
    check_keys(where, values, [field.name for field in dataclasses.fields(kind)])
    made: PostProcessor = kind(**values)
    check_parameters(where, made)
    return made
