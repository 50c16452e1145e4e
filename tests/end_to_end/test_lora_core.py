"""Oracle: the average of the full space, which is also that of the core space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from epmq_cli.commands.merge import merge
from tests.helpers.hubs import merge_config, run_in
from tests.helpers.minihub import build

pytestmark = [  # PEFT warns about features that transformers will remove
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture
def lora_hub(tmp_path: Path) -> Path:
    """The hub of a Llama, whose experts are adapters that PEFT saved, of different ranks and modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hub = build(tmp_path / "hub", "llama")
    for rank, task, modules in ((3, "first", ["q_proj", "down_proj"]), (5, "second", ["q_proj", "v_proj"])):
        shutil.rmtree(hub / task)
        model = AutoModelForCausalLM.from_pretrained(hub / "base")
        torch.manual_seed(rank)
        get_peft_model(model, LoraConfig(r=rank, target_modules=modules, init_lora_weights=False)).save_pretrained(
            hub / task
        )
    return hub


def test_commands_merge_adapters_in_the_core_space(
    lora_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average is that of the full space, from both commands; TIES is another merge."""
    plain = ("guidance=merged", "quant=none", "eval.samples=4", "calib.samples=6", "calib.batch_size=3")
    found = {}
    for name, *options in (("full", "merge=average"), ("core", "merge=average", "++merge.space=core")):
        merge(merge_config(lora_hub, *options), tmp_path / name, [])
        found[name] = load_file(tmp_path / name / "checkpoint" / "model.safetensors")
    assert "merge.space=core: 6 of 21 tensors are merged as products of low rank" in capsys.readouterr().err
    torch.testing.assert_close(found["core"], found["full"], rtol=1e-5, atol=1e-6)
    checkpoint = run_in(tmp_path / "run", lora_hub, "merge=average", "++merge.space=core", *plain)
    torch.testing.assert_close(load_file(checkpoint / "model.safetensors"), found["core"], rtol=1e-5, atol=1e-6)
    for space in ("core", "full"):
        run_in(tmp_path / f"ties_{space}", lora_hub, "merge=ties", f"++merge.space={space}", *plain)
        found[space] = load_file(tmp_path / f"ties_{space}" / "checkpoint" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(found["core"][name], found["full"][name], atol=1e-4)
