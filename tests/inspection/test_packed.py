"""Oracle: a header written by hand, with sizes that can be counted."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from epmq_cli.inspection.content import content_of
from epmq_cli.inspection.opened import open_headers

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": False}


def test_bits_and_groups_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(2):
        name = f"layers.{layer}.q"
        tensors[f"{name}.weight_packed"] = torch.zeros(6, 4, dtype=torch.int32)  # 32 columns of 4 bits
        tensors[f"{name}.weight_scale"] = torch.zeros(6, 4, dtype=torch.float16)
        tensors[f"{name}.weight_shape"] = torch.tensor([6, 32])
    save_file(tensors, tmp_path / "model.safetensors")
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    content = content_of(open_headers(str(tmp_path)))
    assert content["kind"] == "checkpoint"
    assert (content["format"], content["linears"]) == ("compressed-tensors", 2)
    (format,) = content["formats"]
    assert format["weights"] == 2 * 6 * 32
    assert (format["bits"], format["group_sizes"]) == (4, [8])
    assert format["bytes"] == 2 * (6 * 4 * 4 + 6 * 4 * 2 + 16)
    assert [row["name"] for row in content["layers"]] == ["layers.0", "layers.1"]
    del groups["group_0"]["weights"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    assert "has a quantization_config that epmq does not write" in content_of(open_headers(str(tmp_path)))["refused"][0]
