"""The names of a model's weight files."""

from __future__ import annotations

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
