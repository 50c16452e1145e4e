"""Oracle: the adapters that PEFT creates but epmq cannot merge. Each error message is one sentence with a remedy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file

from epmq_cli.errors import ModelError
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.lora.config import PROMPTS, read_config
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles
from epmq_cli.models.open import open_base, open_expert, refuse_unread
from epmq_cli.pipeline.keys import hash_model
from epmq_cli.store.cache import FileHashes

MERGE = "merge it with merge_and_unload of PEFT, save that model with save_pretrained, and give its folder"
SHAPES = {"model.layers.0.q.weight": (4, 4), "model.layers.1.q.weight": (4, 4), "model.table.weight": (6, 4)}
PARTS = {
    f"base_model.model.model.layers.{i}.q.lora_{part}.weight": (2, 4)[:: 1 if part == "A" else -1]
    for i in (0, 1)
    for part in "AB"
}


def folder(path: Path, shapes: dict[str, tuple[int, ...]], file: str, **config: Any) -> Path:
    """Creates a folder with random tensors and a config."""
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(len(shapes))
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path / file)
    (path / ("adapter_config.json" if "adapter" in file else "config.json")).write_text(json.dumps(config))
    return path


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    return open_base(folder(tmp_path / "base", SHAPES, "model.safetensors", hidden_size=4), "base")


def adapter(tmp_path: Path, shapes: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Path:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "me/base", **config}
    return folder(tmp_path / "adapter", shapes or PARTS, "adapter_model.safetensors", **settings)


def opened(path: Path, base: ModelFolder) -> ModelFolder:
    return open_expert(path, "expert of task x", base, base.infos)


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_every_other_type_of_peft_is_refused_with_a_remedy(kind: str, tmp_path: Path) -> None:
    way = "PEFT cannot merge it either; train" if kind in PROMPTS else MERGE
    with pytest.raises(
        ModelError, match=rf"^expert: .* is an adapter of type '{kind}', but epmq merges .* only; {way}"
    ):
        read_config(adapter(tmp_path, peft_type=kind), "expert")
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)]
    assert hasattr(tuner, "merge_and_unload") or kind in PROMPTS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "with alora_invocation_tokens, .*PEFT cannot merge it either"),
        ({"arrow_config": {"top_k": 1}}, "with arrow_config, .*PEFT cannot merge it either"),
        ({"layer_replication": [[0, 2]]}, f"with layer_replication, which epmq cannot merge; {MERGE}"),
        ({"monteclora_config": {"num_samples": 8}}, "with monteclora_config, .* merge_and_unload"),
        ({"use_bdlora": {"nblocks": 2}}, "with use_bdlora, .* merge_and_unload"),
        ({"use_qalora": True}, "with use_qalora, .* merge_and_unload"),
        (
            {"target_parameters": ["experts.gate_up_proj_bias"]},
            r"target_parameters \['experts.gate_up_proj_bias'\], .* merge_and",
        ),
        ({"target_parameters": "weight"}, "target_parameters 'weight', .* merge_and"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "=pissa_niter_4, .* randomized .*path_initial_model_for_weight_con",
        ),
        ({"init_lora_weights": "corda"}, "=corda, .* covariances.*path_initial_model.* or give the changed base"),
        ({"init_lora_weights": "lora_ga"}, "=lora_ga, .* gradients .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "=loftq, .* quantizing .*the model that merge_and_unload returns"),
        ({"init_lora_weights": "new"}, "init_lora_weights in .* must be true, false or one of gaussian, .* got 'new'"),
        ({"use_later": True}, "with use_later, which this version of epmq does not support; merge it"),
        ({"later_config": {"a": 1}}, "with later_config, which this version of epmq does not support; merge it"),
        ({"modules_to_save": "lm_head"}, "modules_to_save in .* must be a list of modules, got 'lm_head'"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying in .* must be true or false, got 'yes'"),
    ],
    ids=lambda value: next(iter(value)) + str(value)[-12:] if isinstance(value, dict) else "",
)
def test_every_option_that_is_not_merged_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^expert: .*{message}"):
        read_config(adapter(tmp_path, **config), "expert")


def test_an_unknown_value_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning is for an unknown option with a plain value. Known options and options that are off cause none."""
    with caplog.at_level(logging.WARNING, "epmq"):
        read_config(
            adapter(tmp_path, r=3, bias="all", later=False, another=None, third="none", qalora_group_size=16), "x"
        )
        assert not caplog.records
        read_config(adapter(tmp_path, later_size=3), "expert")
    assert "later_size=3, which this version of epmq does not know and ignores" in caplog.text


Q0 = "base_model.model.model.layers.0.q"
WRONG: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "a module that is lacking": (
        {name.replace("q.lora", "k.lora"): shape for name, shape in PARTS.items()},
        {},
        r"lacks model.layers.0.k, model.layers.1.k; its model.layers.0 has q; give the model that the adapter was",
    ),
    "another architecture": (
        {name.replace("model.layers", "h"): shape for name, shape in PARTS.items()},
        {},
        r"lacks h.0.q, h.1.q; its tensors begin with model; give the model",
    ),
    "two adapters": (
        {name.replace("_A.", f"_A.{'one' if '.0.' in name else 'two'}."): shape for name, shape in PARTS.items()},
        {},
        r"contains several adapters \(one, two\); save one of them alone",
    ),
    "two adapters of a module": (
        {**PARTS, f"{Q0}.lora_A.two.weight": (2, 4)},
        {},
        "the same tensor of two adapters; save each",
    ),
    "a nested LoRA": (
        {**PARTS, f"{Q0}.base_layer.lora_A.weight": (2, 4), f"{Q0}.base_layer.lora_B.weight": (4, 2)},
        {},
        "contains two LoRAs of one module",
    ),
    "a part that is not known": (
        {**PARTS, f"{Q0}.lora_E": (2, 1)},
        {},
        r"contains .*q.lora_E, which epmq cannot merge; merge",
    ),
    "rows without ids": (
        {**PARTS, "base_model.model.model.table.token_adapter.trainable_tokens_delta": (2, 4)},
        {"trainable_token_indices": {"other": [1, 2]}},
        "must list the token ids of model.table, got {other",
    ),
    "more rows than ids": (
        {**PARTS, "base_model.model.model.table.token_adapter.trainable_tokens_delta": (2, 4)},
        {"trainable_token_indices": [1]},
        r"its rows have the shape \[2, 4\], but there are 1 token ids and a table \[6, 4\]; train or fetch it again",
    ),
    "ids beyond the table": (
        {**PARTS, "base_model.model.model.table.token_adapter.trainable_tokens_delta": (2, 4)},
        {"trainable_token_indices": [1, 6]},
        "token ids must be unique and below 6, the number of rows of the table",
    ),
    "a bias that the base lacks": ({**PARTS, f"{Q0}.lora_B.bias": (4,)}, {"lora_bias": True}, "lacks model.layers.0.q"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_belong_to_the_base_are_named(case: str, base: ModelFolder, tmp_path: Path) -> None:
    shapes, config, message = WRONG[case]
    with pytest.raises(ModelError, match=rf"^expert of task x: .*{message}"):
        opened(adapter(tmp_path, shapes, **config), base)


def test_parameters_of_experts_that_epmq_does_not_know_are_refused(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": (4, 4, 4)}
    base = open_base(folder(tmp_path / "base", shapes, "model.safetensors", model_type="gpt_oss"), "base")
    part = {f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight": (8, 4) for part in "A"}
    with pytest.raises(ModelError, match=f"target_parameters .* is not one of the mixtures .*: mixtral, .*; {MERGE}"):
        opened(adapter(tmp_path, part, target_parameters=["experts.gate_up_proj"]), base)


def test_ambiguous_places_are_refused(tmp_path: Path) -> None:
    shapes = {f"{tower}.layers.0.q.weight": (4, 4) for tower in ("encoder", "decoder")}
    base = open_base(folder(tmp_path / "base", shapes, "model.safetensors"), "base")
    part = {name.replace("model.model.", ""): shape for name, shape in PARTS.items() if ".0." in name}
    with pytest.raises(
        ModelError, match="fits both (en|de)coder.layers.0.q.weight and .* save the adapter from the whole model"
    ):
        opened(adapter(tmp_path, part), base)


def test_a_weight_whose_singular_values_are_equal_has_no_pissa(tmp_path: Path) -> None:
    """Its largest singular vectors are ambiguous."""
    path = adapter(tmp_path, {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)}, init_lora_weights="pissa")
    save_file({"q.weight": torch.eye(4)}, tmp_path / "model.safetensors")
    base = ModelFolder(tmp_path, "base", {}, SafetensorsFiles(tmp_path / "model.safetensors", "base"))
    with pytest.raises(ModelError, match=r"initialization \(pissa\) cannot be recomputed for q.weight .*; merge it"):
        Adapted(path, "expert", base, []).tensor("q.weight")


def test_unused_tensors_are_refused(base: ModelFolder, tmp_path: Path) -> None:
    path = adapter(tmp_path, {**PARTS, "base_model.model.score.weight": (3, 4)}, modules_to_save=["score"])
    expert = opened(path, base)
    refuse_unread(expert, base, base.infos, lambda name: name.startswith("score."), tied=True)
    with pytest.raises(
        ModelError, match=r"contains score.weight, which the base .* does not have; train the adapter without"
    ):
        refuse_unread(expert, base, base.infos, lambda name: False, tied=True)


def test_a_file_with_a_config_beside_it_is_an_adapter(base: ModelFolder, tmp_path: Path) -> None:
    """A pickle is accepted if the suite names it. Its config is then part of the cache key."""
    path = adapter(tmp_path)
    expected = opened(path, base).tensor("model.layers.0.q.weight")
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    file = path / "adapter_model.bin"
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors; give the file .*adapter_model.bin itself"):
        opened(path, base)
    assert torch.equal(opened(file, base).tensor("model.layers.0.q.weight"), expected)
    assert hash_model(file, FileHashes(None)).keys() == {"adapter_model.bin", "adapter_config.json"}


def test_a_folder_of_adapters_names_them(base: ModelFolder, tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(
        ModelError, match=rf"contains adapters in subfolders; give one of them: {tmp_path / 'adapter'}$"
    ):
        opened(tmp_path, base)


def test_an_adapter_beside_a_model_is_interpreted_by_its_tensors(base: ModelFolder, tmp_path: Path) -> None:
    """Covers an adapter with only a config.json, beside the base, beside the merged model, beside another model, and
    beside the model that it names as its base. In the last case, transformers adds the adapter to the model."""
    path = adapter(tmp_path)
    merged = {name: opened(path, base).tensor(name) for name in base.infos}
    name = "model.layers.0.q.weight"
    (path / "config.json").write_text('{"hidden_size": 4}')
    assert torch.equal(opened(path, base).tensor(name), merged[name])
    save_file({own: base.tensor(own) for own in base.infos}, path / "model.safetensors")
    assert torch.equal(opened(path, base).tensor(name), merged[name])
    save_file({own: tensor.clone() for own, tensor in merged.items()}, path / "model.safetensors")
    assert torch.equal(opened(path, base).tensor(name), merged[name])
    assert not isinstance(opened(path, base).source, Adapted)
    other = {own: base.tensor(own) + 0.5 for own in base.infos}
    save_file(other, path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"contains a whole model and an adapter, but the model is neither .*; give a folder"
    ):
        opened(path, base)
    adapter(tmp_path, base_model_name_or_path=str(path))
    torch.testing.assert_close(opened(path, base).tensor(name), merged[name] + 0.5)
    (path / "adapter_model.safetensors").unlink()
    assert torch.equal(opened(path, base).tensor(name), other[name])


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_model_merged_in_a_smaller_type_contains_its_adapter(scale: float, tmp_path: Path) -> None:
    """The merged model and the base are bfloat16. The delta of the smaller adapter is close to the rounding error."""
    place = folder(tmp_path / "half", SHAPES, "model.safetensors", hidden_size=4)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(place / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors")
    small, path = ModelFolder(place, "base"), adapter(tmp_path)
    parts = {name: part * scale for name, part in load_file(path / "adapter_model.safetensors").items()}
    save_file(parts, path / "adapter_model.safetensors")
    (path / "config.json").write_text('{"hidden_size": 4}')
    merged = {name: opened(path, small).tensor(name) for name in small.infos}
    save_file({name: tensor.bfloat16() for name, tensor in merged.items()}, path / "model.safetensors")
    assert not isinstance(opened(path, small).source, Adapted)
    save_file({name: small.tensor(name) for name in small.infos}, path / "model.safetensors")
    assert isinstance(opened(path, small).source, Adapted)


def test_another_base_is_a_warning(
    base: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """epmq detects it by name, by the tensors of a local folder, by a copy of a table, or by a config.json."""
    same = folder(tmp_path / "same", SHAPES, "model.safetensors", hidden_size=4)
    other = folder(tmp_path / "other", SHAPES | {"more": (1,)}, "model.safetensors", hidden_size=4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base_model_name_or_path": "me/base"}, ""),
        ({"base_model_name_or_path": "BASE"}, ""),
        ({"base_model_name_or_path": str(base.path)}, ""),
        ({"base_model_name_or_path": str(same)}, ""),
        ({"base_model_name_or_path": "me/another"}, "was trained on me/another, but the base is .* cannot be compared"),
        (
            {"base_model_name_or_path": str(other)},
            f"was trained on {other}, whose model.layers.0.q.weight differs from",
        ),
    ]
    for config, message in cases:
        caplog.clear()
        opened(adapter(tmp_path, **config), base)
        assert not message or len(caplog.records) == 1
        assert (message == "") == (not caplog.records), config
        if message:
            assert re.search(f"expert of task x: it {message}", caplog.text)
    caplog.clear()
    path = adapter(tmp_path, {**PARTS, "base_model.model.model.table.base_layer.weight": (6, 4)})
    opened(path, base)
    assert (
        "its file contains the model.table.weight of its own base, which differs from that of the base" in caplog.text
    )
    caplog.clear()
    (adapter(tmp_path) / "config.json").write_text('{"hidden_size": 8}')
    opened(tmp_path / "adapter", base)
    assert f"{tmp_path / 'adapter' / 'config.json'} sets hidden_size=8, but the base" in caplog.text
    (tmp_path / "adapter" / "config.json").unlink()
    opened(adapter(tmp_path, base_model_name_or_path=None), base)
    assert "does not name the model that it was trained on" in capsys.readouterr().err.replace("\n", " ")
