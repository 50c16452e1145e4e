"""Llama 4. Oracles: the outputs of transformers, and the files that save_pretrained writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import epmq_cli
from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import check_engine_model
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.average import Average
from epmq_cli.models.linears import in_linears
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert
from epmq_cli.models.stored import as_stored
from epmq_cli.store.safetensors_writer import of
from tests.helpers.architectures import SEEING, TAKEN, built
from tests.helpers.formats import ints
from tests.helpers.hubs import run_in, walk
from tests.helpers.lone import merged_folder, suite_of
from tests.helpers.minihub import decoder_files
from tests.helpers.packs import exporter_of
from tests.helpers.tiers import first
from tests.models.lora.test_adapter import adapter

IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [3, 2, 1, 5, 9, 9]])
FAMILY = FAMILIES["causal_lm"]
GATE = "model.layers.1.feed_forward.experts.2.gate_proj.weight"


@pytest.mark.parametrize("kind", first(1, ["llama4_text", "llama4"]))
def test_linears_compute_what_stacks_do_and_files_stay_the_same(kind: str, tmp_path: Path) -> None:
    model = built({**TAKEN, **SEEING}[kind])
    model.save_pretrained(tmp_path)
    text = getattr(model, "language_model", model)
    wanted = text(IDS).logits
    own = in_linears(model)
    assert own is model
    torch.testing.assert_close(own(IDS).logits, wanted)
    folder = ModelFolder(tmp_path, "base")
    names = FAMILY.tensor_names(folder)
    assert {*names} == {*own.state_dict()}
    for name, stored in names.items():
        tensor = own.state_dict()[name]
        assert folder.infos[stored].shape == tuple(tensor.shape)
        assert torch.equal(folder.tensor(stored), tensor)
    entries = as_stored(kind, (of(stored, folder.tensor(stored)) for stored in folder.infos))
    files = load_file(tmp_path / "model.safetensors")
    assert {entry.name for entry in entries} == {*files}
    for entry in entries:
        assert entry.shape == tuple(files[entry.name].shape)
        assert torch.equal(entry.make(), files[entry.name])


def test_a_state_dict_in_one_file_is_read_alike(tmp_path: Path) -> None:
    model = built(TAKEN["llama4_text"])
    model.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "expert.pt")
    base = open_base(tmp_path / "base", "base")
    expert = open_expert(tmp_path / "expert.pt", "expert", base, ())
    assert expert.infos == base.infos
    assert torch.equal(expert.tensor(GATE), base.tensor(GATE))


@pytest.mark.slow
def test_a_merge_of_one_expert_writes_its_files(tmp_path: Path) -> None:
    hub = decoder_files(tmp_path, built(TAKEN["llama4_text"]))
    suite = suite_of("causal_lm", hub / "base", {"first": hub / "first"})
    merged_folder(tmp_path / "merged", suite, method=Average())
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", hub / "first"))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_beside_the_experts_matches_peft(tmp_path: Path) -> None:
    model = built(TAKEN["llama4_text"])
    model.save_pretrained(tmp_path / "base")
    wanted = adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], r=4)
    base = open_base(tmp_path / "base", "base")
    expert = open_expert(tmp_path / "adapter", "expert", base, [*base.infos])
    changed = set()
    for name in base.infos:
        if ".experts." not in name:
            torch.testing.assert_close(expert.tensor(name), wanted[name], rtol=0, atol=1e-6)
        changed |= set() if torch.equal(expert.tensor(name), base.tensor(name)) else {name}
    parts = ("0.feed_forward.down_proj", "1.feed_forward.shared_expert.down_proj", "0.self_attn.q_proj")
    assert changed == {f"model.layers.{part}.weight" for part in (*parts, "1.self_attn.q_proj")}


@pytest.mark.slow
def test_packed_checkpoints_have_a_tensor_for_each_linear(tmp_path: Path) -> None:
    """As transformers and vLLM read them; scales of a cache too."""
    hub = decoder_files(tmp_path / "hub", built(TAKEN["llama4_text"]))
    options = ["suite.family=auto", "guidance=feature", "pack.engine=vllm", "group_size=32", "eval.samples=4"]
    options += ["quant.kv_cache=fp8"]
    checkpoint = run_in(tmp_path / "run", hub, *options)
    student: Any = walk(hub, *options).student
    with torch.inference_mode():
        assert torch.equal(epmq_cli.load(checkpoint, "cpu", "dequantize")(IDS).logits, student(IDS).logits)
    stored = load_file(checkpoint / "model.safetensors")
    assert f"{GATE}_packed" in stored
    assert not any(name.endswith("gate_up_proj") for name in stored)
    public, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys"))
    with torch.inference_mode():
        torch.testing.assert_close(public.eval()(IDS).logits, student(IDS).logits, rtol=0, atol=1e-6)


def test_engines_that_take_packed_experts() -> None:
    """Oracle: docs/checkpoint.md."""
    llama4 = Base({"model_type": "llama4_text"}, None)
    for engine in (None, "transformers", "vllm"):
        check_engine_model(exporter_of("compressed_tensors", engine=engine), FAMILY, {}, [ints(4, 64)], llama4)
    with pytest.raises(ConfigError, match="vLLM on CPUs takes mixtures of experts with dense weights only"):
        check_engine_model(exporter_of("compressed_tensors", engine="vllm_cpu"), FAMILY, {}, [ints(4, 64)], llama4)
