"""Oracle: the model that merge_and_unload of PEFT returns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles
from epmq_cli.models.open import open_base, open_expert

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT warns about features that transformers will remove
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=3, **SIZE)
LLAMA = LlamaConfig(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=False, **SIZE)


def adapter(model: nn.Module, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Writes an adapter with random tensors and returns the state dict of the merged model."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **options))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape))
    adapted.save_pretrained(folder)
    return dict(adapted.merge_and_unload().state_dict())


@pytest.fixture
def llama(tmp_path: Path) -> tuple[LlamaForCausalLM, ModelFolder]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA)
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    return model, open_base(tmp_path / "base", "base")


def opened(folder: Path, base: ModelFolder, merged: Any = ()) -> ModelFolder:
    return open_expert(folder, "expert of task x", base, merged)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12},
        {"target_modules": "all-linear", "r": 4, "use_rslora": True},
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"up_proj": 5, "q_proj": 7},
        },
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "k_proj"], "r": 3},
        {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "embeddings", "dora"],
)
def test_a_decoder_matches_peft(
    options: dict[str, Any], llama: tuple[LlamaForCausalLM, ModelFolder], tmp_path: Path
) -> None:
    model, base = llama
    expected = adapter(model, tmp_path / "adapter", **options)
    expert = opened(tmp_path / "adapter", base)
    assert expert.config is base.config
    assert expert.infos.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        found = expert.tensor(name)
        assert expert.infos[name].shape == tuple(found.shape)
        torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)
        changed += not torch.equal(found, base.tensor(name))
    assert changed > 1


def test_tables_of_a_larger_vocabulary_are_the_adapters(
    llama: tuple[LlamaForCausalLM, ModelFolder], tmp_path: Path
) -> None:
    """PEFT saves the resized embeddings as whole tensors. The merge can pad the base's."""
    model, base = llama
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(22, mean_resizing=False)
    adapted = get_peft_model(larger, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expert, names = opened(tmp_path / "adapter", base), {name: name for name in base.infos}
    source = MergeSource(NamedTensors(base, names), {"x": NamedTensors(expert, names)}, "pad")
    assert source.vocabulary_size == 22
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(source.expert("x", name), larger.state_dict()[name])
        assert torch.equal(source.base(name)[:20], model.state_dict()[name])


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_classifier_on_a_base_of_other_names_keeps_its_head(wrapped: bool, tmp_path: Path) -> None:
    """The adapter uses bert.encoder...; the base uses encoder... or, if wrapped, also bert.encoder..."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT)
    expected = adapter(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query", "value"])
    (model if wrapped else model.bert).save_pretrained(tmp_path / "base")
    base, family = open_base(tmp_path / "base", "base"), FAMILIES["bert"]
    names = family.tensor_names(base)
    expert = opened(tmp_path / "adapter", base, names.values())
    assert family.tensor_names(expert).keys() == names.keys()
    for name, stored in family.tensor_names(expert).items():
        torch.testing.assert_close(expert.tensor(stored), expected[f"bert.{name}"], rtol=0, atol=1e-6)
    assert torch.equal(expert.tensor("classifier.weight"), expected["classifier.weight"])
    assert not torch.equal(expected["classifier.weight"], model.classifier.weight)


def test_an_adapter_of_a_part_may_be_of_more_modules_than_the_base_stores(tmp_path: Path) -> None:
    """The adapter is for BertModel, and the base is stored as a classifier: the adapter's names lack a prefix."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT)
    model.save_pretrained(tmp_path / "base")
    expected = adapter(model.bert, tmp_path / "adapter", target_modules=["query"])
    expert = opened(tmp_path / "adapter", open_base(tmp_path / "base", "base"))
    name = "encoder.layer.1.attention.self.query.weight"
    torch.testing.assert_close(expert.tensor(f"bert.{name}"), expected[name], rtol=0, atol=1e-6)


def test_the_merged_one_of_two_similar_towers_is_adapted(tmp_path: Path) -> None:
    """CLIP's towers share module names and, here, sizes. The patch embedding is a convolution."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**SIZE, "vocab_size": 20},
        vision_config={**SIZE, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = CLIPModel(config)
    model.save_pretrained(tmp_path / "base")
    base, family = open_base(tmp_path / "base", "base"), FAMILIES["clip"]
    vision = CLIPVisionModel(config.vision_config)
    vision.load_state_dict(model.vision_model.state_dict())
    expected = adapter(vision, tmp_path / "adapter", target_modules=["q_proj", "fc1", "patch_embedding"])
    expert = opened(tmp_path / "adapter", base, family.tensor_names(base).values())
    for name, stored in family.tensor_names(expert).items():
        own = name.removeprefix("vision_model.")
        torch.testing.assert_close(expert.tensor(stored), expected[own], rtol=0, atol=1e-6)
    text = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(expert.tensor(text), base.tensor(text))


def edited(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_error_for_unsupported_adapters_names_the_remedy(
    llama: tuple[LlamaForCausalLM, ModelFolder], tmp_path: Path
) -> None:
    model, base = llama
    folder = tmp_path / "adapter"
    adapter(model, folder, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"base: .* is an adapter .*give the model that the adapter was trained on"):
        open_base(folder, "base")
    edited(folder, layer_replication=[[0, 2]])
    with pytest.raises(ModelError, match=r"adapter with layer_replication, .* merge_and_unload of PEFT"):
        opened(folder, base)
    edited(folder, layer_replication=None, peft_type="IA3")
    with pytest.raises(ModelError, match=r"expert of task x: .* is an adapter of type 'IA3', .* merge_and_unload"):
        opened(folder, base)
    edited(folder, peft_type="LORA")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"has no adapter_model.safetensors; give the file .*adapter_model.bin itself, or save"
    ):
        opened(folder, base)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(a|a)+b", "timed out"), ("(", r"missing \)"), ("(" * 5000, "recursion"), ("q_proj", "NoneType")],
    ids=["endless", "open", "deep", "no number"],
)
def test_a_pattern_that_cannot_be_used_is_named(pattern: str, reason: str, tmp_path: Path) -> None:
    """One of the patterns causes catastrophic backtracking in `re`."""
    alpha = None if pattern == "q_proj" else 8
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "alpha_pattern": {pattern: alpha}}), encoding="utf-8"
    )
    module = "a" * 60 + ".q_proj"
    parts = {f"{module}.lora_A.weight": torch.ones(1, 2), f"{module}.lora_B.weight": torch.ones(2, 1)}
    save_file(parts, tmp_path / "adapter_model.safetensors")
    save_file({f"{module}.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    base = ModelFolder(tmp_path, "base", {}, SafetensorsFiles(tmp_path / "model.safetensors", "base"))
    with pytest.raises(ModelError, match=f"expert: .*alpha_pattern in .* is invalid .*{reason}"):
        Adapted(tmp_path, "expert", base, [])


def test_adapters_of_another_base_are_refused(llama: tuple[LlamaForCausalLM, ModelFolder], tmp_path: Path) -> None:
    _, base = llama
    adapter(BertModel(BERT), tmp_path / "bert", target_modules=["query"])
    with pytest.raises(
        ModelError, match=r"was not trained on the base .*, which lacks encoder.layer.0.attention.self.query, .*; its"
    ):
        opened(tmp_path / "bert", base)
    wider = LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 32}))
    adapter(wider, tmp_path / "wide", target_modules=["q_proj"])
    with pytest.raises(
        ModelError, match=r"q_proj.weight has the shape \[16, 32\] in the adapter and \[16, 16\] in the base"
    ):
        opened(tmp_path / "wide", base)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["q.lora_A.weight", "q.lora_B.weight", "q.lora_C.weight"],
            "contains q.lora_C.weight, which epmq cannot merge",
        ),
        (["q.weight"], "contains no LoRA tensors; train or fetch it again"),
        (["q.lora_A.weight"], "contains lora_A of q, which epmq cannot merge; merge it with merge_and_unload of PEFT"),
    ],
)
def test_tensors_that_are_not_adapters_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    base = ModelFolder(tmp_path, "base", {}, SafetensorsFiles(tmp_path / "adapter_model.safetensors", "base"))
    with pytest.raises(ModelError, match=f"expert: .*{message}"):
        Adapted(tmp_path, "expert", base, [])


A, B, LENGTHS = "q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector"
SOUND = {A: torch.ones(2, 4), B: torch.ones(3, 2), LENGTHS: torch.ones(3)}
ODD: dict[str, tuple[dict[str, torch.Tensor], tuple[int, ...], str]] = {
    "rank 0": (
        {A: torch.ones(0, 4), B: torch.ones(3, 0)},
        (3, 4),
        r"does not fit q.weight: A \[0, 4\] and B \[3, 0\] must have the same rank above 0",
    ),
    "two ranks": ({A: torch.ones(1, 4)}, (3, 4), r"A \[1, 4\] and B \[3, 2\] must have the same rank"),
    "no dimension": ({A: torch.tensor(1.0), B: torch.tensor(1.0)}, (3, 4), r"A \[\] and B \[\] must have"),
    "a vector": ({A: torch.ones(2)}, (3,), r"fit q.weight: A \[2\] and B \[3, 2\] must have .* as many axes as \[3\]"),
    "a vector's A": ({}, (3,), r"the same rank above 0 and as many axes as \[3\]; train or fetch it again"),
    "lengths": (
        {LENGTHS: torch.ones(5)},
        (3, 4),
        r"fit q.weight: lora_magnitude_vector has the shape \[5\], but the module has 3 outputs; train or fetch",
    ),
    "a kernel in B": (
        {A: torch.ones(2, 4, 2, 2), B: torch.ones(3, 2, 2, 2)},
        (3, 4, 2, 2),
        r"A \[2, 4, 2, 2\] and B \[3, 2, 2, 2\] must have",
    ),
    "complex": ({A: torch.ones(2, 4, dtype=torch.complex64)}, (3, 4), "contains q.lora_A.weight in the type C64"),
    "integers": (
        {B: torch.ones(3, 2, dtype=torch.int64)},
        (3, 4),
        "in the type I64, but epmq merges F64, F32, F16, BF16",
    ),
}


def adapted(folder: Path, tensors: dict[str, torch.Tensor], shape: tuple[int, ...], **config: Any) -> Adapted:
    """An adapter in which these tensors replace valid ones. The base has one tensor of this shape."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file({**SOUND, **tensors}, folder / "adapter_model.safetensors")
    save_file({"q.weight": torch.ones(shape)}, folder / "model.safetensors")
    base = ModelFolder(folder, "base", {}, SafetensorsFiles(folder / "model.safetensors", "base"))
    return Adapted(folder, "expert", base, [])


@pytest.mark.parametrize("case", ODD)
def test_shapes_and_types_that_cannot_be_merged_are_refused(case: str, tmp_path: Path) -> None:
    assert adapted(tmp_path, {}, (3, 4)).tensor("q.weight").shape == (3, 4)
    tensors, shape, message = ODD[case]
    with pytest.raises(ModelError, match=f"expert: .*{message}"):
        adapted(tmp_path, tensors, shape)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("use_rslora", "no", "use_rslora in .*adapter_config.json must be true or false, got 'no'; fetch"),
        ("fan_in_fan_out", 1, "fan_in_fan_out in .* must be true or false, got 1"),
        ("lora_alpha", True, "lora_alpha or alpha_pattern in .* is invalid .True is not a finite number"),
        ("lora_alpha", float("nan"), "lora_alpha or alpha_pattern in .* is invalid .nan is not a finite number"),
    ],
)
def test_options_of_another_type_are_refused(option: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"expert: {message}"):
        adapted(tmp_path, {}, (3, 4), **{option: value})
