"""Tensors in files, and the weights (out, in) of linears that the rest of epmq knows: conv1d.py, stacked_experts.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from epmq_cli.models import conv1d, stacked_experts
from epmq_cli.models.conv1d import Named
from epmq_cli.models.headers import TensorInfo

if TYPE_CHECKING:
    from epmq_cli.store.safetensors_writer import Entry


def as_linears(config: Mapping[str, Any], tensors: Named) -> Named:
    """The stored tensors of a model with this config.json, with a weight (out, in) for each linear."""
    return stacked_experts.apart(config, conv1d.upright(config, tensors))


def infos_as_linears(config: Mapping[str, Any], infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same for the headers of the tensors."""
    return stacked_experts.apart_infos(config, conv1d.upright_infos(config, infos))


def as_stored(model_type: str | None, entries: Iterable[Entry]) -> list[Entry]:
    """The tensors of a model as its files hold them. `entries`: with a weight (out, in) for each linear."""
    return stacked_experts.stacked(model_type, conv1d.as_stored(model_type, entries))
