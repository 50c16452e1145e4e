"""Oracles: safetensors with torch, and the errors of damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.errors import ModelError
from epmq_cli.models.headers import SafetensorsHeaders, TensorInfo
from epmq_cli.models.model_folder import SafetensorsFiles


def test_headers_say_what_torch_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = SafetensorsHeaders(tmp_path, "model").infos
    assert infos == SafetensorsFiles(tmp_path, "model").infos
    assert {name: info.size for name, info in infos.items()} == {name: t.nbytes for name, t in tensors.items()}
    assert TensorInfo((2, 3), "F8_E4M3").size == 6


def test_a_damaged_header_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="is corrupted or not a safetensors file"):
        SafetensorsHeaders(tmp_path, "model")
