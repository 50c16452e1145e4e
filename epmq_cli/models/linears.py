"""Models of transformers with an nn.Linear for each weight that epmq quantizes."""

from __future__ import annotations

from typing import Any

from epmq_cli.models.conv1d import with_linears
from epmq_cli.models.routed_experts import unpacked


def in_linears(model: Any) -> Any:
    """The model itself with linears for the experts of a mixture and for modules of the class Conv1D."""
    return with_linears(unpacked(model))
