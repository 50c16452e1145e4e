"""No refinement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoRefinement:
    """`refine=none`."""
