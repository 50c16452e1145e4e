"""Oracle: the same checkpoint, dequantized by its first forward pass, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.hubs import run_in
from tests.helpers.minihub import build


def test_a_decoder_dequantized_on_load_has_the_same_outputs(tmp_path: Path) -> None:
    """Exporters need dense weights before the first call of the model."""
    hub = build(tmp_path / "hub", "llama")
    checkpoint = run_in(tmp_path / "run", hub, "eval.stages=[]", "calib.samples=8")
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"].pop("dequantize") is True
    shutil.copytree(checkpoint, tmp_path / "later")
    (tmp_path / "later" / "config.json").write_text(json.dumps(config))
    found, wanted = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (checkpoint, tmp_path / "later"))
    assert found.model.layers[0].mlp.up_proj.weight.is_floating_point()
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
