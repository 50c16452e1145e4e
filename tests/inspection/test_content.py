"""Oracles: PEFT's files of an adapter, and the sizes of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from epmq_cli.inspection.content import content_of, totals
from epmq_cli.inspection.opened import open_headers
from epmq_cli.models.headers import TensorInfo


def write_adapter(folder: Path, **options: object) -> None:
    tensors = {}
    for name in ("q_proj", "v_proj"):
        module = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{module}.lora_B.weight"] = torch.zeros(32, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "base_model_name_or_path": "owner/base", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_has_ranks_targets_and_its_base(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    content = content_of(open_headers(str(tmp_path)))
    assert (content["kind"], content["base"], content["refused"]) == ("adapter", "owner/base", [])
    assert (content["ranks"], content["targets"]) == ({"4": 2}, {"q_proj": 1, "v_proj": 1})
    assert content["parameters"] == 4 * 4 * 32


def test_an_adapter_of_all_experts_of_a_block_has_no_rank_without_its_base(tmp_path: Path) -> None:
    write_adapter(tmp_path, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    file = tmp_path / "adapter_model.safetensors"
    own = "base_model.model.model.layers.0.mlp.experts"
    parts = {f"{own}.{place}lora_{part}.weight": torch.zeros(8, 8) for place in ("base_layer.", "") for part in "AB"}
    save_file({**load_file(file), **parts}, file)
    content = content_of(open_headers(str(tmp_path)))
    assert (content["ranks"], content["refused"]) == ({"4": 2}, [])
    assert content["targets"] == {"experts": 2, "q_proj": 1, "v_proj": 1}


def test_an_adapter_that_a_run_refuses_has_its_sentence(tmp_path: Path) -> None:
    write_adapter(tmp_path, peft_type="IA3")
    (sentence,) = content_of(open_headers(str(tmp_path)))["refused"]
    assert sentence.startswith(
        f"adapter: {tmp_path} is an adapter of type 'IA3', but epmq merges adapters of type LORA"
    )


def test_totals_count_types_bytes_and_bits() -> None:
    own = totals([TensorInfo((2, 3), "F16"), TensorInfo((6,), "F32")])
    assert own == {
        "tensors": 2, "parameters": 12, "bytes": 36, "bits_per_weight": 24.0, "types": {"F16": 6, "F32": 6}
    }  # fmt: skip
