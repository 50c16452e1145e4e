"""Oracle: the tensors themselves, under the names that training code gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.models import wrappers
from epmq_cli.models.model_folder import ModelFolder, TensorInfo
from epmq_cli.models.wrappers import Renaming, misfit, refuse_wrapped, renamings, unwrap

LLAMA = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
)
BERT = (
    "embeddings.word_embeddings.weight",
    *(f"encoder.layer.{i}.output.dense.{part}" for i in range(2) for part in ("weight", "bias")),
    "pooler.dense.weight",
)
CLIP = tuple(f"{tower}.encoder.layers.{i}.mlp.fc1.weight" for tower in ("text_model", "vision_model") for i in range(2))


class Named:
    """One tensor per name; its value is the position of the name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._values = {name: torch.tensor([float(place)]) for place, name in enumerate(names)}
        self.infos = {name: TensorInfo((1,), "F32") for name in names}

    def tensor(self, name: str) -> Tensor:
        return self._values[name]


def folder(kind: str, names: tuple[str, ...], role: str = "expert of task a") -> ModelFolder:
    return ModelFolder(Path("some/place"), role, {"model_type": kind}, Named(names))


WRAPPED: dict[str, tuple[str, tuple[str, ...], Callable[[str], str]]] = {
    "torch.compile": ("llama", LLAMA, lambda n: f"_orig_mod.{n}"),
    "torch.compile of each layer": ("llama", LLAMA, lambda n: n.replace("layers.0.", "layers.0._orig_mod.")),
    "DistributedDataParallel": ("llama", LLAMA, lambda n: f"module.{n}"),
    "DDP of torch.compile": ("llama", LLAMA, lambda n: f"module._orig_mod.{n}"),
    "FSDP": ("llama", LLAMA, lambda n: f"_fsdp_wrapped_module.{n}".replace("q_proj", "_fsdp_wrapped_module.q_proj")),
    "checkpointed": ("llama", LLAMA, lambda n: n.replace("mlp.", "_checkpoint_wrapped_module.mlp.")),
    "PEFT": ("llama", LLAMA, lambda n: f"base_model.model.{n}"),
    "Lightning": ("llama", LLAMA, lambda n: f"model.{n}"),
    "a student": ("llama", LLAMA, lambda n: f"student.{n}"),
    "nobody knows": ("llama", LLAMA, lambda n: f"some.thing.{n}"),
    "of a model for pictures and texts": ("llama", LLAMA, lambda n: f"language_model.{n}"),
    "likewise in transformers 5": ("llama", LLAMA, lambda n: n.replace("model.", "model.language_model.")),
    "a classifier": ("bert", BERT, lambda n: f"net.bert.{n}"),
    "an encoder alone": ("bert", BERT, lambda n: f"backbone.{n}"),
    "CLIP": ("clip", CLIP, lambda n: f"model.{n}"),
    "a tower alone": ("clip", CLIP, lambda n: f"module.{n}" if n.startswith("vision") else f"text.{n}"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_names_are_mapped_to_those_of_the_base(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, names, wrap = WRAPPED[case]
    base, family = folder(kind, names, "base"), FAMILIES["causal_lm" if kind == "llama" else kind]
    wanted = family.tensor_names(base)
    expert = folder(kind, tuple(map(wrap, names)))
    said: list[str] = []
    monkeypatch.setattr(wrappers, "say", said.append)
    found = unwrap(expert, base, wanted, family.tensor_names)
    own = family.tensor_names(found)
    assert own.keys() >= wanted.keys()
    for name, stored in wanted.items():
        assert torch.equal(found.tensor(own[name]), base.tensor(stored))
    assert len(said) == 1
    assert said[0].startswith("expert of task a: its tensor names are read with")


def test_heads_get_the_same_treatment() -> None:
    """A renaming that covers all names takes precedence over one that covers only the encoder."""
    base, family = folder("bert", BERT, "base"), FAMILIES["bert"]
    expert = folder("bert", (*(f"model.bert.{name}" for name in BERT), "model.classifier.weight"))
    found = unwrap(expert, base, family.tensor_names(base), family.tensor_names)
    assert "classifier.weight" in found.infos


@pytest.mark.parametrize("name", ["causal_lm", "clip"])
def test_matching_names_stay_unchanged(name: str) -> None:
    names = LLAMA if name == "causal_lm" else CLIP
    base, family = folder(name, names, "base"), FAMILIES[name]
    expert = folder(name, (*names, "module.extra.weight"))
    assert unwrap(expert, base, family.tensor_names(base), family.tensor_names) is expert


def test_two_models_in_one_file_are_refused() -> None:
    base, family = folder("llama", LLAMA, "base"), FAMILIES["causal_lm"]
    expert = folder("llama", tuple(f"{who}.{name}" for who in ("student", "teacher") for name in LLAMA))
    with pytest.raises(
        ModelError, match=r"contains several models, because .* without '(student|teacher).' and without"
    ):
        unwrap(expert, base, family.tensor_names(base), family.tensor_names)


def test_adapters_that_are_not_merged_are_refused() -> None:
    base, family = folder("llama", LLAMA, "base"), FAMILIES["causal_lm"]
    expert = folder("llama", (*LLAMA, "model.layers.0.self_attn.q_proj.lora_A.default.weight"))
    with pytest.raises(ModelError, match="lora_A.default.weight beside the model's own tensors; give the folder"):
        unwrap(expert, base, family.tensor_names(base), family.tensor_names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            tuple(n.removeprefix("model.") for n in LLAMA[:-1]),
            "it contains 6 of .* 7 tensors; it was saved without its output",
        ),
        (
            tuple(f"net.{n}" for n in LLAMA[:-1]),
            "it contains 0 of .* 7 tensors, or 6 if its names are read without 'net.'",
        ),
        (("h.0.attn.c_attn.weight",), "it contains 0 of .* 7 tensors, so it has another architecture"),
    ],
    ids=["no output layer", "wrapped", "another"],
)
def test_names_that_do_not_match_are_reported(names: tuple[str, ...], message: str) -> None:
    base, family = folder("llama", LLAMA, "base"), FAMILIES["causal_lm"]
    expert, wanted = folder("llama", names), family.tensor_names(base)
    assert unwrap(expert, base, wanted, family.tensor_names) is expert
    assert re.search(message, misfit(expert, base, wanted, family.tensor_names))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "student."])
def test_a_wrapped_base_is_refused_with_its_prefix(prefix: str) -> None:
    refuse_wrapped(folder("llama", LLAMA, "base"))
    with pytest.raises(
        ModelError,
        match=f"base: some/place has tensor names with '{prefix}', which a training wrapper adds, .*save_pretrained",
    ):
        refuse_wrapped(folder("llama", tuple(prefix + name for name in LLAMA), "base"))


def test_no_renaming_maps_two_names_to_one() -> None:
    found = renamings(["_orig_mod.a.b", "a.b", "x.a.b"], ["a.b"])
    assert all(len({renaming(name) for name in ("_orig_mod.a.b", "a.b", "x.a.b")}) == 3 for renaming in found)


def test_renamings_have_a_description() -> None:
    assert str(Renaming(("_orig_mod",), "module.", "")) == "without '_orig_mod.' and 'module.'"
    assert str(Renaming((), "", "model.")) == "with 'model.' before them"
    assert str(Renaming((), "model.text.", "model.")) == "with 'model.' in place of 'model.text.'"
