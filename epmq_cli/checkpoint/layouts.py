"""Chooses the layout of a checkpoint by the `quantization_config` of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epmq_cli.checkpoint import compressed_tensors, gptq
from epmq_cli.checkpoint.dense import DenseLayout
from epmq_cli.checkpoint.exporter import Layout, foreign_config
from epmq_cli.models.model_folder import read_json

LAYOUTS: dict[str, Callable[[Path, Mapping[str, Any]], Layout]] = {
    compressed_tensors.METHOD: compressed_tensors.layout,
    gptq.METHOD: gptq.layout,
}
"""By `quant_method`."""


def layout_of(folder: Path) -> Layout:
    """The layout of a checkpoint folder; CheckpointError if epmq did not write its quantization_config."""
    quantization = read_json(folder, "config.json", "checkpoint").get("quantization_config")
    if quantization is None:
        return DenseLayout()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    make = LAYOUTS.get(method) if isinstance(method, str) else None
    if make is None:
        raise foreign_config(folder)
    return make(folder, quantization)
