"""Oracle: PEFT. Each adapter is saved, loaded with PeftModel.from_pretrained and merged with merge_and_unload.

Every parameter must be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.models.lora import ties
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open import open_base, open_expert
from tests.helpers.tiers import only

pytestmark = [  # PEFT warns about the options of these adapters
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
]

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZE, **WORDS, "max_position_embeddings": 16, "num_labels": 3}
DECODER = {**SIZE, **WORDS, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
PICTURE = {"image_size": 8, "patch_size": 4}


def clip() -> nn.Module:
    towers = {"text_config": {**SIZE, "vocab_size": 20}, "vision_config": {**SIZE, **PICTURE}, "projection_dim": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=False))


def made(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings))


MODELS: dict[str, tuple[str, Callable[[], nn.Module], list[str]]] = {
    "bert": ("bert", made("BertForSequenceClassification", "BertConfig", **TEXT), ["query", "dense"]),
    "roberta": ("roberta", made("RobertaForSequenceClassification", "RobertaConfig", **TEXT), ["key", "output.dense"]),
    "deberta": ("deberta", made("DebertaV2ForSequenceClassification", "DebertaV2Config", **TEXT), ["query_proj"]),
    "distilbert": (
        "distilbert",
        made(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **{"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 20, "num_labels": 3},
        ),
        ["q_lin", "lin2"],
    ),
    "vit": ("vit", made("ViTForImageClassification", "ViTConfig", **SIZE, **PICTURE, num_labels=3), ["q_proj", "fc1"]),
    "clip": ("clip", clip, ["q_proj", "fc2"]),
    "t5": ("t5", t5, ["q", "wo"]),
    "llama": ("causal_lm", made("LlamaForCausalLM", "LlamaConfig", **DECODER), ["q_proj", "down_proj"]),
    "phi3": ("causal_lm", made("Phi3ForCausalLM", "Phi3Config", **DECODER), ["qkv_proj", "gate_up_proj"]),
    "gemma3": ("causal_lm", made("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER), ["k_proj", "up_proj"]),
    "qwen2": ("causal_lm", made("Qwen2ForCausalLM", "Qwen2Config", **DECODER), ["v_proj", "o_proj"]),
}
"""By name: the family, the model and the adapted modules."""

OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {r".*\.0\..*": 3}, "alpha_pattern": {r"layer.*\.1\..*": 3}},
    "bias": {"bias": "all"},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(q|o)_proj"},
    "first layer": {"layers_to_transform": [0]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "table": {"target_modules": ["embed_tokens", "q_proj"]},
    "table dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2]}},
    "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"], "alpha_pattern": {"q_proj": 3}},
    "parameters": {"target_modules": [], "target_parameters": ["v_proj.weight"], "alpha_pattern": {"v_proj.weight": 3}},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "kasa": {"kasa_config": KasaConfig()},
    **{init: {"init_lora_weights": init} for init in ("gaussian", "eva", "orthogonal", "mica", "pissa", "olora")},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True, "target_modules": "all-linear"},
    "olora rslora": {"init_lora_weights": "olora", "use_rslora": True, "target_modules": ["q_proj", "lm_head"]},
    "pissa table": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
}


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][1]().eval()
    with torch.no_grad():  # so that no bias is 0 and no norm is 1
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return model


def save_trained(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """Saves an adapter and changes all its parameters first, as training does."""
    torch.manual_seed(1)
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 4, "lora_alpha": 12, **options}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.05 * torch.rand(parameter.shape))
    peft.save_pretrained(folder)
    return peft


def merged_by_peft(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    return dict(PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict())


def check(name: str, base: ModelFolder, folder: Path, expected: dict[str, Tensor], changed: int = 1) -> ModelFolder:
    """Compares every parameter of the merged model under the names in the base's files."""
    family = FAMILIES[MODELS[name][0]]
    expert = family.open(folder, "expert of task x", base)
    found = {family.spelling(stored): stored for stored in expert.infos}
    moved = 0
    for own, tensor in ((family.spelling(own), tensor) for own, tensor in expected.items()):
        if own not in found:  # a tied copy, which neither the base nor the expert stores
            assert own in ties.tied_names(base)
            continue
        read = expert.tensor(found[own])
        assert expert.infos[found[own]].shape == tuple(read.shape)
        torch.testing.assert_close(
            read.float(), tensor, rtol=1e-5, atol=2e-6, msg=lambda text, own=own: f"{own}: {text}"
        )
        moved += found[own] not in base.infos or not torch.equal(read.float(), base.tensor(found[own]).float())
    assert moved >= changed
    return expert


def saved(name: str, folder: Path) -> ModelFolder:
    model_of(name).save_pretrained(folder)  # type: ignore[operator]
    return open_base(folder, "base")


@pytest.mark.parametrize("name", only(("bert", "deberta", "clip", "t5", "phi3"), MODELS))
def test_every_option_on_every_family_matches_peft(name: str, tmp_path: Path) -> None:
    base, targets = saved(name, tmp_path / "base"), MODELS[name][2]
    for option, settings in OPTIONS.items():
        folder = tmp_path / option
        save_trained(model_of(name), folder, target_modules=targets, init_lora_weights=False, **settings)
        check(name, base, folder, merged_by_peft(model_of(name), folder), changed=2)


def test_every_special_kind_matches_peft(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    for kind, settings in SPECIAL.items():
        save_trained(model_of("llama"), tmp_path / kind, **{"target_modules": ["q_proj", "v_proj"], **settings})
        check("llama", base, tmp_path / kind, merged_by_peft(model_of("llama"), tmp_path / kind))


def test_biases_of_lora_are_added_scaled(tmp_path: Path) -> None:
    """Tests `lora_bias` with and without trained biases of the modules."""
    base = saved("bert", tmp_path / "base")
    for bias in ("none", "lora_only"):
        save_trained(model_of("bert"), tmp_path / bias, target_modules=["query"], lora_bias=True, bias=bias)
        check("bert", base, tmp_path / bias, merged_by_peft(model_of("bert"), tmp_path / bias), changed=4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_saved_classifier_are_stored_twice(bias: str, tmp_path: Path) -> None:
    base = saved("bert", tmp_path / "base")
    save_trained(model_of("bert"), tmp_path / "a", target_modules=["query"], bias=bias, task_type="SEQ_CLS")
    file = tmp_path / "a" / "adapter_model.safetensors"
    assert ("base_model.model.classifier.modules_to_save.bias" in load_file(file)) == (bias == "all")
    check("bert", base, tmp_path / "a", merged_by_peft(model_of("bert"), tmp_path / "a"), changed=4)
    if bias == "all":
        tensors = load_file(file)
        save_file({**tensors, "base_model.model.classifier.modules_to_save.bias": torch.zeros(3)}, file)
        with pytest.raises(ModelError, match="modules_to_save.bias and .*classifier.bias with different values"):
            open_lora(tmp_path / "a", base)


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_match_peft(dora: bool, tmp_path: Path) -> None:
    base = saved("vit", tmp_path / "base")
    settings = {"target_modules": ["projection"], "init_lora_weights": False, "use_dora": dora}
    save_trained(model_of("vit"), tmp_path / "adapter", **settings)
    check("vit", base, tmp_path / "adapter", merged_by_peft(model_of("vit"), tmp_path / "adapter"))


def open_lora(folder: Path, base: ModelFolder) -> ModelFolder:
    return open_expert(folder, "expert of task x", base, base.infos)


def test_gpt2_stores_its_linears_transposed(tmp_path: Path) -> None:
    """They are read as (out, in)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base", "base")
    for kind, settings in {"pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True}, "mica": {}}.items():
        save_trained(model, tmp_path / kind, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
        expected = merged_by_peft(model, tmp_path / kind)
        expert = open_lora(tmp_path / kind, base)
        for name in base.infos:
            wanted = expected[name].T if ".c_" in name and name.endswith("weight") else expected[name]
            torch.testing.assert_close(expert.tensor(name).float(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("named", ["vit.layers", "vit.encoder.layer", "encoder.layer", "layers"])
def test_vit_adapters_have_the_names_of_either_version_of_transformers(named: str, tmp_path: Path) -> None:
    """ViT files use the names of transformers 4, its modules those of transformers 5. An adapter may use either."""
    base, folder = saved("vit", tmp_path / "base"), tmp_path / "adapter"
    save_trained(model_of("vit"), folder, target_modules=["q_proj", "fc2"], init_lora_weights=False)
    expected = merged_by_peft(model_of("vit"), folder)
    file = folder / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        if "encoder" in named:
            name = name.replace("attention.q_proj", "attention.attention.query").replace("mlp.fc2", "output.dense")
        renamed[name.replace("vit.layers", named)] = tensor
    save_file(renamed, file)
    check("vit", base, folder, expected, changed=4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
        ("layers.", "_orig_mod.layers."),
        (".lora_A.", ".lora_A.math."),
        (".lora_B.", ".lora_B.default."),
    ],
)
def test_names_of_other_trainers_are_read(before: str, after: str, tmp_path: Path) -> None:
    base, folder = saved("llama", tmp_path / "base"), tmp_path / "adapter"
    save_trained(model_of("llama"), folder, target_modules=["q_proj"], init_lora_weights=False)
    expected = merged_by_peft(model_of("llama"), folder)
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(before, after): tensor for name, tensor in load_file(file).items()}, file)
    check("llama", base, folder, expected, changed=2)
