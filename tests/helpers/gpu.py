"""The device of tests with the marker gpu; on machines without a GPU, `make test-standin` runs them on a stand-in."""

from __future__ import annotations

import torch

DEVICE = "cuda"
OWN = f"device={DEVICE}"
STANDIN = hasattr(torch.ops.standin, "peak")
"""Whether the device is that of tests/standin."""


def skip_reason() -> str | None:
    """The reason why tests with the marker gpu cannot run; None if they can."""
    return None if torch.cuda.is_available() else "needs a GPU that torch.cuda finds"
