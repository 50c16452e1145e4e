"""Oracle: merge_and_unload of PEFT, on every type of mixtures and every place of its LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.mixtures import MIXTURES
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.routed_experts import unpacked
from tests.helpers.architectures import MIXED, TAKEN, built
from tests.helpers.tiers import only

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
]

FAMILY = FAMILIES["causal_lm"]
FILE = "adapter_model.safetensors"
ATTENTION = ["q_proj", "o_proj"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def is_llama(kind: str) -> bool:
    return kind == "llama4_text"


def router(kind: str) -> dict[str, Any]:
    """The options for the router, which is a linear in Llama 4 alone."""
    if is_llama(kind):
        return {"target_modules": ["router", "q_proj"]}
    return {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}


def linears(kind: str) -> dict[str, Any]:
    names = MIXTURES[kind]
    return {"target_modules": rf".*\.experts\.\d+\.({names.gate}|{names.up}|{names.down})"}


PLACES: dict[str, Any] = {
    "attention": lambda kind: {"target_modules": ATTENTION},
    "router": router,
    "saved": lambda kind: {"target_modules": ATTENTION, "modules_to_save": ["router" if is_llama(kind) else "gate"]},
    "linears": linears,
    "linears dora": lambda kind: {**linears(kind), "use_dora": True},
    "parameters": lambda kind: {"target_modules": [], "target_parameters": BOTH},
    "one parameter": lambda kind: {"target_modules": ATTENTION, "target_parameters": BOTH[1:], "use_rslora": True},
    "everything": lambda kind: {
        **router(kind),
        "target_parameters": [*BOTH, *router(kind).get("target_parameters", [])],
        "rank_pattern": {"experts.gate_up_proj": 3, "q_proj": 2},
        "alpha_pattern": {r"layers\.0\..*gate_up_proj": 5, "experts.down_proj": 7, "gate.weight": 11, "router": 11},
    },
}


CONVERTED = [kind for kind in MIXED if kind not in ("llama4_text", "qwen2_moe")]
"""The types whose names of transformers 4 PEFT turns into those of parameters; it forgets Qwen 2."""


def names_of(kind: str) -> list[str]:
    names = MIXTURES[kind]
    return [names.gate, names.up, names.down]


def adapter(kind: str, place: str, folder: Path) -> tuple[ModelFolder, dict[str, Tensor]]:
    """Saves a base and an adapter; returns the base, and what PEFT merges under the names of files."""
    model: Any = built(TAKEN[kind])
    model.save_pretrained(folder / "base")
    if "linears" in place:  # as in transformers 4
        model = unpacked(model)
        model.config.model_type = "custom"  # else PEFT turns the names into those of parameters
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **PLACES[place](kind)}
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    adapted.save_pretrained(folder / "adapter")
    return FAMILY.open(folder / "base", "base", None), expected(kind, adapted)


def expected(kind: str, adapted: Any) -> dict[str, Tensor]:
    merged = adapted.merge_and_unload()
    merged.config.model_type = kind
    return dict(unpacked(merged).state_dict())


def check(base: ModelFolder, folder: Path, wanted: dict[str, Tensor]) -> None:
    expert = FAMILY.open(folder, "expert of task x", base)
    assert expert.infos.keys() == base.infos.keys() == wanted.keys()
    for name, tensor in wanted.items():
        found = expert.tensor(name)
        assert expert.infos[name].shape == tuple(found.shape)
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    changed = {name for name, tensor in wanted.items() if not torch.equal(tensor, base.tensor(name))}
    assert isinstance(expert.source, Adapted)
    assert changed == expert.source.changed != set()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", only(("mixtral", "llama4_text"), MIXED))
def test_adapters_are_merged_as_peft_merges_them(kind: str, place: str, tmp_path: Path) -> None:
    base, wanted = adapter(kind, place, tmp_path)
    check(base, tmp_path / "adapter", wanted)


@pytest.mark.parametrize("kind", only(("mixtral",), CONVERTED))
def test_names_of_transformers_4_mean_what_peft_makes_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT turns them into parameters: when it trains, and when it loads an adapter of linears."""
    monkeypatch.setitem(PLACES, "names", lambda kind: {"target_modules": [*ATTENTION, "gate", *names_of(kind)]})
    base, wanted = adapter(kind, "names", tmp_path)
    assert any("experts.base_layer.lora_A" in name for name in load_file(tmp_path / "adapter" / FILE))
    check(base, tmp_path / "adapter", wanted)
    base, _ = adapter(kind, "linears", tmp_path)
    edit(tmp_path / "adapter", target_modules=names_of(kind))
    check(
        base, tmp_path / "adapter", expected(kind, PeftModel.from_pretrained(built(TAKEN[kind]), tmp_path / "adapter"))
    )


def edit(folder: Path, **values: Any) -> None:
    """Changes the config of an adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def as_before_0_20(folder: Path, experts: int) -> None:
    """Gives A and B of parameters the axes that they had in older versions of PEFT."""
    tensors = load_file(folder / FILE)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A, B = tensors[name], tensors[other]
        tensors[name] = B.reshape(len(B), -1, experts).permute(2, 1, 0).reshape(len(A), -1).contiguous()
        tensors[other] = A.reshape(experts, -1, A.shape[1]).permute(2, 1, 0).reshape(A.shape[1], -1).contiguous()
    save_file(tensors, folder / FILE)
    edit(folder, peft_version="0.18.1")


@pytest.mark.parametrize("kind", only(("llama4_text", "qwen2_moe"), MIXED))
def test_adapters_of_older_versions_have_other_axes(kind: str, tmp_path: Path) -> None:
    """Those of Qwen here are square, so that only the version tells which."""
    base, wanted = adapter(kind, "parameters", tmp_path)
    as_before_0_20(tmp_path / "adapter", 4)
    check(base, tmp_path / "adapter", wanted)


def test_square_matrices_of_an_unknown_version_are_refused(tmp_path: Path) -> None:
    base, _ = adapter("qwen2_moe", "parameters", tmp_path)
    edit(tmp_path / "adapter", peft_version=None)
    with pytest.raises(
        ModelError,
        match=r"does not tell by peft_version .*experts\.down_proj; set peft_version in adapter_config.json to",
    ):
        FAMILY.open(tmp_path / "adapter", "expert of task x", base)


Tensors = dict[str, Tensor]


def shorter(tensors: Tensors) -> Tensors:
    return {name: tensor[1:] if "lora_A" in name else tensor for name, tensor in tensors.items()}


def elsewhere(tensors: Tensors) -> Tensors:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


def twice(tensors: Tensors) -> Tensors:
    inner = {name: tensor for name, tensor in tensors.items() if "base_layer" in name}
    return {
        **inner,
        **{name.replace("experts.base_layer", "experts"): tensor.clone() for name, tensor in inner.items()},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shorter,
            r"does not fit .*experts: A \[7, 32\] and B \[128, 8\] must be of 4 experts and gate_up_proj .*; give",
        ),
        (elsewhere, "lacks model.layers.7.mlp.experts.0.w1, .*; give the model that the adapter was trained on"),
        (twice, "contains two LoRAs of .*experts.gate_up_proj; save each adapter separately"),
    ],
)
def test_tensors_that_do_not_fit_the_experts_are_named(change: Any, message: str, tmp_path: Path) -> None:
    base, _ = adapter("mixtral", "parameters", tmp_path)
    file = tmp_path / "adapter" / FILE
    save_file(change(load_file(file)), file)
    with pytest.raises(ModelError, match=rf"^expert of task x: .*{message}"):
        FAMILY.open(tmp_path / "adapter", "expert of task x", base)


def test_experts_that_are_saved_whole_are_refused_but_for_llama_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLACES, "whole", lambda kind: {"target_modules": ATTENTION, "modules_to_save": ["experts"]})
    base, wanted = adapter("llama4_text", "whole", tmp_path)
    check(base, tmp_path / "adapter", wanted)
    base, _ = adapter("mixtral", "whole", tmp_path)
    with pytest.raises(ModelError, match="^expert of task x: .* contains whole experts .*; merge it with"):
        FAMILY.open(tmp_path / "adapter", "expert of task x", base)
