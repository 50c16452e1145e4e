"""Oracle: the same experts as whole folders in float32; the storage of an expert must not change the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, CLIPModel, CLIPVisionModel

from epmq_cli.data.images import Npz
from epmq_cli.data.suite import Suite
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.families.heads.classifier import read_head
from epmq_cli.merge.suite_models import SuiteModels
from tests.conftest import TASKS, drifted, write_suite
from tests.helpers.hubs import run_in

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about deprecated features of transformers


def opened(hub: Path, family: str, expert: Path | str, base: Path | None = None) -> SuiteModels:
    """The suite of a hub with another first expert, and optionally another base."""
    values: Any = OmegaConf.to_container(OmegaConf.load(hub / "configs/suite/mini.yaml"))
    tasks = {name: {**task, "data": Npz("unread.npz")} for name, task in values["tasks"].items()}
    tasks[TASKS[0]]["expert"] = str(expert)
    return SuiteModels(Suite("mini", family, str(base or hub / "base"), tasks), FAMILIES[family])


def tensors(models: SuiteModels) -> dict[str, Tensor]:
    return {name: models.source.expert(TASKS[0], name) for name in models.source.names}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def full_clip(hub: Path) -> CLIPModel:
    """The base with the vision tower of the first expert."""
    model = CLIPModel.from_pretrained(hub / "base")
    model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(hub / TASKS[0]).state_dict())
    return model


@pytest.mark.parametrize("kind", ["shards", "full model", "state dict", "vision state dict", "safetensors file"])
def test_clip_experts_are_equal_in_every_form(kind: str, clip_hub: Path, tmp_path: Path) -> None:
    vision, model, path = CLIPVisionModel.from_pretrained(clip_hub / TASKS[0]), full_clip(clip_hub), tmp_path / "expert"
    if kind == "shards":
        vision.save_pretrained(path, max_shard_size="10KB")
        assert len(list(path.glob("*.safetensors"))) > 1
    elif kind == "full model":
        model.save_pretrained(path)
    elif kind == "safetensors file":
        path = clip_hub / TASKS[0] / "model.safetensors"
    else:
        path = tmp_path / "expert.pt"
        torch.save((vision if "vision" in kind else model).state_dict(), path)
    same(tensors(opened(clip_hub, "clip", path)), tensors(opened(clip_hub, "clip", clip_hub / TASKS[0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_of_other_types_than_the_base_are_read_in_float32(
    dtype: torch.dtype, clip_hub: Path, tmp_path: Path
) -> None:
    CLIPModel.from_pretrained(clip_hub / "base").half().save_pretrained(tmp_path / "base")
    CLIPVisionModel.from_pretrained(clip_hub / TASKS[0]).to(dtype).save_pretrained(tmp_path / "expert")
    models = opened(clip_hub, "clip", tmp_path / "expert", tmp_path / "base")
    exact = tensors(opened(clip_hub, "clip", clip_hub / TASKS[0]))
    same(tensors(models), {name: tensor.to(dtype).float() for name, tensor in exact.items()})
    assert models.source.dtype(models.source.names[-1]) == torch.float16


def test_a_classifier_as_state_dict_keeps_its_head(bert_hub: Path, tmp_path: Path) -> None:
    expert = BertForSequenceClassification.from_pretrained(bert_hub / TASKS[0])
    torch.save({"state_dict": expert.state_dict()}, tmp_path / "expert.bin")
    models = opened(bert_hub, "bert", tmp_path / "expert.bin")
    same(tensors(models), tensors(opened(bert_hub, "bert", bert_hub / TASKS[0])))
    assert torch.equal(read_head(models.experts[TASKS[0]], "classifier", 32)["weight"], expert.classifier.weight)


def test_a_run_with_an_adapter_and_a_state_dict(bert_hub: Path, tmp_path: Path) -> None:
    """Oracle: the simple average, compared with the checkpoint."""
    base = BertModel.from_pretrained(bert_hub / "base")
    model = BertForSequenceClassification.from_pretrained(bert_hub / TASKS[0])
    model.bert.load_state_dict(base.state_dict())
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**options))
    adapted.save_pretrained(tmp_path / "adapter")
    second = drifted(base, 7)
    whole = BertForSequenceClassification.from_pretrained(bert_hub / TASKS[1])
    whole.bert.load_state_dict(second.state_dict())
    torch.save(whole.state_dict(), tmp_path / "second.pt")
    suite: Any = OmegaConf.to_container(OmegaConf.load(bert_hub / "configs/suite/mini.yaml"))
    for task, path in zip(TASKS, ("adapter", "second.pt"), strict=True):
        suite["tasks"][task]["expert"] = str(tmp_path / path)
    write_suite(tmp_path / "hub", suite)
    checkpoint = run_in(
        tmp_path / "run", tmp_path / "hub", "merge=average", "quant=none", "guidance=merged", "eval.samples=4"
    )
    found = BertModel.from_pretrained(checkpoint).state_dict()
    merged = adapted.merge_and_unload().bert.state_dict()
    expected = {name: (tensor + second.state_dict()[name]) / 2 for name, tensor in merged.items()}
    same(found, expected, 1e-6)


def test_a_base_that_is_an_adapter_or_a_file_and_quantized_experts_are_refused(clip_hub: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="base: .* is an adapter"):
        opened(clip_hub, "clip", clip_hub / TASKS[0], tmp_path)
    with pytest.raises(ModelError, match="base: .* is a file; give the model folder"):
        opened(clip_hub, "clip", clip_hub / TASKS[0], clip_hub / "base/model.safetensors")
    CLIPVisionModel.from_pretrained(clip_hub / TASKS[0]).save_pretrained(tmp_path / "expert")
    path = tmp_path / "expert/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {}}))
    with pytest.raises(ModelError, match="expert of task first: .* is quantized already"):
        opened(clip_hub, "clip", tmp_path / "expert")


def test_the_error_for_an_unsupported_type_lists_the_supported_ones(bert_hub: Path, tmp_path: Path) -> None:
    expert = BertForSequenceClassification.from_pretrained(bert_hub / "first")
    path = tmp_path / "first.pt"
    torch.save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in expert.state_dict().items()}, path)
    with pytest.raises(
        ModelError, match="float8_e4m3fn in the expert .*; save the expert in one of F64, F32, F16, BF16$"
    ):
        opened(bert_hub, "bert", path)
