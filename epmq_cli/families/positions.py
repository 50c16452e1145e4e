"""The number of positions of a model: the most tokens that it reads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""Its names in configs."""

STRETCHED = ("linear", "dynamic", "yarn")
"""Scalings of rotary embeddings whose configs may state the positions before the scaling."""


def decoder_positions(config: Any) -> int | None:
    """The positions of a decoder, scaling of rotary embeddings included; None if its config states none, as with
    relative positions. A sliding window does not limit them."""
    stated = next((value for name in NAMES if isinstance(value := getattr(config, name, None), int)), None)
    if stated is None or stated < 1:
        return None
    return max(stated, *(int(reach) for reach in _scaled(config, stated)), 0)


def _scaled(config: Any, stated: int) -> Iterator[float]:
    for rope in _ropes(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if not isinstance(factor, int | float):
            continue
        if isinstance(original, int):
            yield original * factor
        elif rope.get("rope_type", rope.get("type")) in STRETCHED:
            yield stated * factor


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of all layers, or of each kind of layer."""
    if isinstance(parameters, Mapping):
        kinds = [value for value in parameters.values() if isinstance(value, Mapping)]
        yield from kinds or [parameters]
