"""The device of tests that have the marker gpu.

EPMQ_TEST_DEVICE=cpu runs their bodies on the CPU, to find mistakes in them where there is no GPU; with
TRITON_INTERPRET=1, too, so do those of Triton's kernels.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("EPMQ_TEST_DEVICE", "cuda")
OWN = f"device={DEVICE}"
ON_CUDA = DEVICE != "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def lacking() -> str | None:
    """Why tests with the marker gpu cannot run; None where they can."""
    return "needs a GPU that torch.cuda finds" if ON_CUDA and not torch.cuda.is_available() else None


def devices() -> int:
    """How many there are to share a run out over."""
    return torch.cuda.device_count() if ON_CUDA else 2
