"""Oracles: configs that epmq never writes, derived from one that it wrote; each is refused in a sentence."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epmq_cli.commands.verify import verify
from epmq_cli.errors import CheckpointError, EpmqError
from epmq_cli.pipeline.verify import tensor_problems
from epmq_cli.store.manifest import write_manifest
from tests.helpers.tiers import first


def check(checkpoint: Path) -> None:
    verify(checkpoint, False, "cpu", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.pop("ignore"),
        lambda q: q.update(config_groups=3),
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=9),
        lambda q: q["config_groups"]["group_0"].pop("weights"),
    ],
    ids=range(4),
)
def test_a_config_that_epmq_does_not_write_is_refused(change: Callable[[object], object], checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_manifest(checkpoint, {})
    with pytest.raises(CheckpointError, match="config.json has a quantization_config that epmq does not write; give"):
        check(checkpoint)


@pytest.mark.parametrize("architecture", ["pipeline", "no_such_thing", "AutoModel"])
def test_an_unknown_architecture_is_refused(architecture: str, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"architectures": [architecture]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_manifest(checkpoint, {})
    with pytest.raises(CheckpointError, match=f"config.json names {architecture}, which transformers does not have"):
        check(checkpoint)


def paths(node: object) -> Iterator[tuple[str | int, ...]]:
    """The paths to all values in nested objects and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (key,)
        yield from ((key, *path) for path in paths(child))


@pytest.mark.parametrize("value", first(1, ["x", -1, None, []]))
def test_any_value_in_a_config_leads_to_sentences_only(value: object, checkpoint: Path) -> None:
    """Replaces each value of config.json by one of another type or out of range."""
    file = checkpoint / "config.json"
    text, wrong = file.read_text(), 0
    for path in paths(json.loads(text)):
        config = json.loads(text)
        functools.reduce(lambda node, key: node[key], path[:-1], config)[path[-1]] = value
        file.write_text(json.dumps(config))
        try:
            wrong += bool(tensor_problems(checkpoint))
        except EpmqError as error:
            wrong += 1
            assert "\n" not in str(error)
    assert wrong > 20
