"""Models that read texts and pictures. Oracles: transformers, the expert itself, the files of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import epmq_cli
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.average import Average
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.preflight import check_parts
from tests.conftest import drifted
from tests.families.test_decoder import distances
from tests.helpers.architectures import GROUPED, SEEING, built
from tests.helpers.hubs import config, run_in, walk
from tests.helpers.lone import merged_folder, suite_of
from tests.helpers.minihub import decoder_files
from tests.helpers.tiers import only
from tests.models.lora.test_adapter import adapter

FAMILY = FAMILIES["causal_lm"]
IDS = torch.tensor([[1, 9, 10, 11, 12, 13]])
OPTIONS = ("suite.family=auto", "guidance=feature", "bits=4", "eval.samples=4")
PLAIN = [kind for kind in SEEING if kind != "llama4"]


@pytest.mark.parametrize("kind", only(("gemma3",), PLAIN))
def test_checkpoints_reload_with_equal_outputs_and_pictures_stay_dense(kind: str, tmp_path: Path) -> None:
    hub = decoder_files(tmp_path / "hub", built(SEEING[kind]))
    checkpoint = run_in(tmp_path / "run", hub, *OPTIONS)
    public, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    student: Any = walk(hub, *OPTIONS).student
    with torch.inference_mode():
        assert torch.equal(public.eval()(IDS).logits, student(IDS).logits)
        assert torch.equal(epmq_cli.load(checkpoint, "cpu", "dequantize")(IDS).logits, student(IDS).logits)
    ignored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["ignore"]
    names = {name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {block.name(name) for block in FAMILY.blocks(student) for name in block.linears}
    assert {*ignored} == names - blocks
    assert any(".vi" in name for name in ignored)
    stored = ModelFolder(checkpoint, "checkpoint")
    for name, tensor in student.state_dict().items():
        if ".vi" in name or name.startswith(FAMILY.stacks(student)[0].bypassed):
            assert torch.equal(stored.tensor(name), tensor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_a_lone_expert_is_reproduced(kind: str, tmp_path: Path) -> None:
    """What texts reach ends as the expert, what they do not reach is the expert's."""
    hub = decoder_files(tmp_path, built(SEEING[kind]))
    base, student = distances(hub, "suite.family=auto")
    assert student < 0.05 * base
    suite = suite_of("causal_lm", hub / "base", {"first": hub / "first"})
    merged = AutoModelForImageTextToText.from_pretrained(merged_folder(tmp_path / "merged", suite, method=Average()))
    wanted = AutoModelForImageTextToText.from_pretrained(hub / "first")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name


def older(folder: Path) -> None:
    """Writes the names of the hub's first files in place of those of transformers 5."""
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_files_with_older_names_are_read_under_the_models_own(tmp_path: Path) -> None:
    model = built(SEEING["gemma3"])
    model.save_pretrained(tmp_path)
    older(tmp_path)
    folder = ModelFolder(tmp_path, "base")
    names = FAMILY.tensor_names(folder)
    assert {*names} == {*model.state_dict()} - {"lm_head.weight"}
    assert {*names.values()} == {*folder.infos}
    for name, stored in names.items():
        assert torch.equal(folder.tensor(stored), model.state_dict()[name])


@pytest.mark.slow
def test_a_flat_config_of_qwen_2_5_vl_is_read(tmp_path: Path) -> None:
    """As on the hub: the settings of the language model stand beside vision_config."""
    hub = decoder_files(tmp_path / "hub", built(SEEING["qwen2_5_vl"]))
    for path in hub.glob("*/config.json"):
        content = json.loads(path.read_text())
        text = content.pop("text_config")
        path.write_text(json.dumps({**text, **content}))
    checkpoint = run_in(tmp_path / "run", hub, *OPTIONS)
    public = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    student: Any = walk(hub, *OPTIONS).student
    with torch.inference_mode():
        assert torch.equal(public(IDS).logits, student(IDS).logits)


@pytest.mark.slow
def test_experts_with_more_tokens_make_the_vocabulary_larger(tmp_path: Path) -> None:
    base = built(SEEING["gemma3"])
    hub = decoder_files(tmp_path / "hub", base)
    larger = drifted(base, 0)
    larger.resize_token_embeddings(GROUPED["vocab_size"] + 3, mean_resizing=False)
    larger.save_pretrained(hub / "first")
    checkpoint = run_in(tmp_path / "run", hub, *OPTIONS, "+suite.vocabulary=pad")
    assert json.loads((checkpoint / "config.json").read_text())["text_config"]["vocab_size"] == 27
    assert AutoModelForImageTextToText.from_pretrained(checkpoint)(IDS).logits.shape[-1] == 27


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_an_adapter_of_text_and_vision_matches_peft(kind: str, tmp_path: Path) -> None:
    model = built(SEEING[kind])
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "qkv", "down_proj"]
    wanted = adapter(model, tmp_path / "adapter", target_modules=targets, r=4)
    base = FAMILY.open(tmp_path / "base", "base", None)
    expert = FAMILY.open(tmp_path / "adapter", "expert", base)
    changed = set()
    for name, stored in FAMILY.tensor_names(base).items():
        torch.testing.assert_close(expert.tensor(stored), wanted[name], rtol=0, atol=1e-6)
        changed |= set() if torch.equal(expert.tensor(stored), base.tensor(stored)) else {name}
    assert any(".language_model." in name for name in changed)
    assert any(".vi" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "option", "sentence"),
    [
        ("gemma3", "transform=hadamard", "rotates decoders of the types .*, got gemma3 in base; use transform=none"),
        ("gemma3", "pack=gguf", "GGUF is written for .*, got the model type gemma3"),
        ("mllama", "pack=gptq", r"stores all linears of a block, and model.language_model.layers.1.cross_attn.q_proj"),
        ("mllama", "pack.engine=vllm", "vLLM on CUDA has no models of type mllama; use pack.engine=null and another"),
    ],
)
def test_what_is_not_made_of_them_is_refused(kind: str, option: str, sentence: str, tmp_path: Path) -> None:
    hub = decoder_files(tmp_path, built(SEEING[kind]))
    with pytest.raises(ConfigError, match=sentence):
        steps.open_models(make_job(config(hub, "suite.family=auto", "group_size=32", option)))


def test_texts_pass_by_the_blocks_that_attend_to_pictures() -> None:
    """Oracle: the forward pass of transformers."""
    model = built(SEEING["mllama"])
    stack = FAMILY.stacks(model)[0]
    names = {*stack.bypassed, *(block.prefix for block in stack.blocks)}
    called: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    FAMILY.features(model, {"input_ids": IDS})
    assert called == [block.prefix for block in stack.blocks]
    assert stack.bypassed == ("model.language_model.layers.1",)
    check_parts(model, FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attention"), [("mllama", "layers.1.cross_attn"), ("llama4", "vision_model.model.layers.0.self_attn")]
)
def test_a_cache_that_texts_do_not_fill_is_refused(kind: str, attention: str, tmp_path: Path) -> None:
    hub = decoder_files(tmp_path / "hub", built(SEEING[kind]))
    options = [*OPTIONS, "quant.kv_cache=fp8", *(["pack.engine=vllm", "group_size=32"] if kind == "llama4" else [])]
    with pytest.raises(ModelError, match=f"{attention} caches no keys and values .*; use quant.kv_cache=null"):
        run_in(tmp_path / "run", hub, *options)


@pytest.mark.slow
def test_llama_4_with_images_runs_on_texts(tmp_path: Path) -> None:
    """Dense and packed checkpoints load in transformers. The whole model fails in transformers 5.24. Texts
    that the experts generate need the cache's argument of the model."""
    hub = decoder_files(tmp_path / "hub", built(SEEING["llama4"]))
    dense = [*OPTIONS, "pack=dense", "calib.source=generate", "calib.samples=4"]
    packed = [*OPTIONS, "pack.engine=vllm", "group_size=32"]
    checkpoint = run_in(tmp_path / "dense", hub, *dense)
    public, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        student: Any = walk(hub, *dense).student
        wanted = student.language_model(IDS).logits
        torch.testing.assert_close(public.eval().language_model(IDS).logits, wanted, rtol=0, atol=1e-6)
        with pytest.raises(AttributeError, match="image_outputs"):
            public(IDS)
        checkpoint = run_in(tmp_path / "packed", hub, *packed)
        student = walk(hub, *packed).student
        assert torch.equal(epmq_cli.load(checkpoint, "cpu", "dequantize")(IDS).logits, student(IDS).logits)
        public = AutoModelForImageTextToText.from_pretrained(checkpoint).eval().language_model
        torch.testing.assert_close(public(IDS).logits, student(IDS).logits, rtol=0, atol=1e-6)
    names = {name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {block.name(name) for block in FAMILY.blocks(student) for name in block.linears}
    assert {*json.loads((checkpoint / "config.json").read_text())["quantization_config"]["ignore"]} == names - blocks
