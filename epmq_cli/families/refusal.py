"""Errors for models that `epmq run` cannot calibrate."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Protocol

from epmq_cli.errors import ModelError


class Named(Protocol):
    """A family, or its architecture."""

    @property
    def name(self) -> str: ...
    @property
    def model_types(self) -> tuple[str, ...]: ...


MERGES = "epmq merge suite=causal_lm merges models of other architectures too"
"""The way out for a model that `epmq run` refuses."""


def unknown_tensor(tensors: Iterable[str], modules: Collection[str], unsolved: Iterable[str]) -> str | None:
    """The first tensor that is neither a weight or bias of these modules nor matches a pattern of tensors that stay as
    merged."""
    patterns = re.compile("|".join(unsolved) or "(?!)")
    for name in tensors:
        module, _, tensor = name.rpartition(".")
        if not (module in modules and tensor in ("weight", "bias")) and not patterns.fullmatch(name):
            return name
    return None


def refused(family: Named, reason: str) -> ModelError:
    """The error for a base that this family cannot calibrate; `reason` names the part of the model and the problem."""
    types = ", ".join(family.model_types)
    return ModelError(f"base: {reason}; epmq run with family {family.name} takes {types}; {MERGES}")
