"""Oracle: the state dicts and outputs of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, CLIPModel, CLIPProcessor

from epmq_cli.checkpoint.task_heads import read_heads
from epmq_cli.data.batching import Batch
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families import FAMILIES, family_of
from epmq_cli.families.family import load_model
from epmq_cli.families.structure import Linears, Norm, Table
from epmq_cli.merge.leftovers import check_added
from epmq_cli.merge.tied_weights import Member
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config, run_in

CPU = torch.device("cpu")


def stored(folder: Path, tensors: dict[str, torch.Tensor], model_type: str) -> ModelFolder:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file(tensors, folder / "model.safetensors")
    return ModelFolder(folder, "expert")


def test_unknown_families_name_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="suite.family must be one of auto, bart, beit, bert, causal_lm, clip, .*, got 'gpt'"
    ):
        family_of("gpt")


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_tensor_names_are_those_of_the_loaded_model(name: str, request: pytest.FixtureRequest) -> None:
    hub: Path = request.getfixturevalue(f"{name}_hub")
    family = FAMILIES[name]
    model = load_model(family, hub / "base", CPU)
    base = family.tensor_names(ModelFolder(hub / "base", "base"))
    expert = family.tensor_names(ModelFolder(hub / "first", "expert"))
    assert base.keys() == expert.keys() <= model.state_dict().keys()
    part = "vision_model." if name == "clip" else ""
    parameters = {key for key, _ in model.named_parameters() if key.startswith(part)}
    assert base.keys() == parameters


def batch_of(name: str) -> Batch:
    """A batch of two samples."""
    generator = torch.Generator().manual_seed(0)
    if name == "clip":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }


def called(model: nn.Module, names: Iterable[str], forward: Callable[[], object]) -> list[str]:
    """The names of these modules in the order in which a forward pass calls them."""
    order: list[str] = []
    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, module in modules.items()
    ]
    forward()
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_steps_are_all_linears_and_norms_in_the_order_of_a_forward_pass(
    name: str, request: pytest.FixtureRequest
) -> None:
    family = FAMILIES[name]
    model = load_model(family, request.getfixturevalue(f"{name}_hub") / "base", CPU)
    sections = [*family.blocks(model), family.readout(model)]
    assert len(sections) == 3
    steps = [
        section.name(local)
        for section in sections
        for step in section.steps
        for local in ([step.name] if isinstance(step, Norm) else step.names)
    ]
    wanted = [str(family.stacks(model)[0].first_norm), *steps]
    tower = "vision_" if name == "clip" else ""
    parts = {
        child
        for child, module in model.named_modules()
        if child.startswith(tower or ("embeddings", "encoder", "pooler")) or child == "visual_projection"
        if isinstance(module, nn.Linear | nn.LayerNorm)
    }
    assert set(wanted) == parts
    assert called(model, wanted, lambda: family.features(model, batch_of(name))) == wanted


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_readout_maps_the_last_hidden_state_to_the_features(name: str, request: pytest.FixtureRequest) -> None:
    family, batch = FAMILIES[name], batch_of(name)
    model = load_model(family, request.getfixturevalue(f"{name}_hub") / "base", CPU)
    with torch.inference_mode():
        tower = model.vision_model if name == "clip" else model
        hidden = tower(**batch, output_hidden_states=True).hidden_states[-1]  # type: ignore[operator]
        features = family.readout(model).module(hidden)
        torch.testing.assert_close(features, family.features(model, batch))


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_outputs_are_added_to_their_streams(name: str, request: pytest.FixtureRequest) -> None:
    family, batch = FAMILIES[name], batch_of(name)
    model = load_model(family, request.getfixturevalue(f"{name}_hub") / "base", CPU)
    blocks, readout = family.blocks(model), family.readout(model)
    after = {"self_attn.out_proj": "layer_norm2", "attention.output.dense": "attention.output.LayerNorm"}
    after["output.dense"] = "output.LayerNorm"  # this norm reads the sum; CLIP's last sum leaves the block
    for block, behind in pairwise([*blocks, readout]):
        writing = [step for step in block.steps if isinstance(step, Linears) and step.stream]
        assert len(writing) == 2
        for step in writing:
            linear, stream = (block.module.get_submodule(local) for local in (step.names[0], str(step.stream)))
            follower = block.module.get_submodule(after[step.names[0]]) if step.names[0] in after else behind.module
            caught: dict[nn.Module, torch.Tensor] = {}
            if follower is readout.module:  # it is not a module of the model
                follower = readout.module.get_submodule("vision_model.post_layernorm")
            with torch.inference_mode():
                hooks = [
                    module.register_forward_pre_hook(lambda m, args, to=caught: to.update({m: args[0]}))
                    for module in (linear, stream, follower)
                ]
                family.features(model, batch)
            for hook in hooks:
                hook.remove()
            added = caught[stream] + linear(caught[linear])
            wanted = caught[follower]
            torch.testing.assert_close(added[:, 0] if wanted.ndim < added.ndim else added, wanted)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_in_the_last_block_other_tokens_matter_only_through_mixing_modules(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Oracle: the gradient of the features with respect to the outputs of each step."""
    family, batch = FAMILIES[name], batch_of(name)
    model = load_model(family, request.getfixturevalue(f"{name}_hub") / "base", CPU)
    last, outputs = family.blocks(model)[-1], {}
    names = [n for step in last.steps for n in ([step.name] if isinstance(step, Norm) else step.names)]
    mixing = {step.name for step in last.steps if isinstance(step, Norm) and step.mixing}
    mixing |= {n for step in last.steps if isinstance(step, Linears) for n in step.mixing}

    def keep(local: str, output: torch.Tensor) -> torch.Tensor:
        outputs[local] = output.detach().requires_grad_()
        return outputs[local]

    for local in names:  # one pass each, because a leaf cuts off the modules before it
        handle = last.module.get_submodule(local).register_forward_hook(lambda _, __, out, n=local: keep(n, out))
        features = family.features(model, batch)
        handle.remove()
        gradient = torch.autograd.grad(features.square().sum(), outputs[local])[0]
        assert family.stacks(model)[0].read_token == 0
        assert gradient[:, 0].abs().max() > 0
        real = gradient[:, 1:][batch["attention_mask"][:, 1:].bool()] if name == "bert" else gradient[:, 1:]
        assert bool(real.abs().max() > 0) is (local in mixing), local


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_stem_is_everything_before_the_blocks(name: str, request: pytest.FixtureRequest) -> None:
    family = FAMILIES[name]
    hub: Path = request.getfixturevalue(f"{name}_hub")
    model = load_model(family, hub / "base", CPU)
    tensors: set[str] = set()
    for part in family.stacks(model)[0].stem:
        if isinstance(part, Table):
            tensors.add(f"{part.name}.weight")
        else:
            tensors |= {f"{part.convolution}.weight", f"{part.positions}.weight", str(part.class_token)}
    sections = [*family.blocks(model), family.readout(model)]
    behind = {section.name(local) for section in sections for local in section.module.state_dict()}
    norm = {f"{family.stacks(model)[0].first_norm}.{part}" for part in ("weight", "bias")}
    merged = set(family.tensor_names(ModelFolder(hub / "base", "base")))
    assert tensors == merged - behind - norm


def test_the_family_decides_whether_each_expert_has_its_own_head(clip_hub: Path, bert_hub: Path) -> None:
    for hub in (clip_hub, bert_hub):
        job = make_job(config(hub))
        models, model, _ = steps.open_models(job)
        first, second = (task.head["weight"] for task in steps.prepare_tasks(job, model, models))
        assert torch.equal(first, second) is not (job.family.heads == "own")  # both tasks have the same classes
        assert len({tuple(row.tolist()) for row in first}) == 3


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_logits_are_linear_in_the_head_inputs(name: str) -> None:
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    features, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (3, 8), (3,)))
    head = {"weight": weight} if name == "clip" else {"weight": weight, "bias": bias}
    model = nn.Identity()
    found, x = family.logits(model, features, head), family.head_inputs(model, features, head)
    assert x.shape == features.shape
    wanted = x @ weight.T + bias if name == "bert" else 100 * x @ weight.T
    torch.testing.assert_close(found, wanted)


def test_vision_models_with_and_without_prefix_and_whole_clips_are_equal(clip_hub: Path, tmp_path: Path) -> None:
    family = FAMILIES["clip"]
    bare = load_file(clip_hub / "first" / "model.safetensors")
    prefixed = {f"vision_model.{name}": tensor for name, tensor in bare.items()}
    prefixed["vision_model.embeddings.position_ids"] = torch.arange(5)  # older versions of transformers stored it
    whole = load_file(clip_hub / "base" / "model.safetensors")
    names = [
        family.tensor_names(stored(tmp_path / "bare", bare, "clip_vision_model")),
        family.tensor_names(stored(tmp_path / "prefixed", prefixed, "clip_vision_model")),
        family.tensor_names(stored(tmp_path / "whole", whole, "clip")),
    ]
    assert names[0].keys() == names[1].keys() == names[2].keys()
    assert set(names[0].values()) == bare.keys()
    assert set(names[1].values()) < prefixed.keys()


def test_old_spellings_of_berts_layer_norms_are_read(bert_hub: Path, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    modern = load_file(bert_hub / "first" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in modern.items()
    }
    found = family.tensor_names(stored(tmp_path / "old", old, "bert"))
    assert found.keys() == family.tensor_names(ModelFolder(bert_hub / "first", "expert")).keys()
    assert found["embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"


def test_a_bert_without_pooler_or_head_is_refused(bert_hub: Path, tmp_path: Path) -> None:
    tensors = load_file(bert_hub / "first" / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if "pooler" not in name and "classifier" not in name}
    folder = stored(tmp_path / "without", without, "bert")
    with pytest.raises(ModelError, match="has no pooler, which the heads of its family read"):
        check_added(FAMILIES["bert"], Member(folder, {}, FAMILIES["bert"].tensor_names(folder)), {})
    headless = ModelFolder(bert_hub / "base", "expert of task x")
    job = make_job(config(bert_hub))
    with pytest.raises(ModelError, match=r"expert of task x: .* has no classifier.weight, the head of its task"):
        job.family.head(
            load_model(job.family, bert_hub / "base", CPU), bert_hub / "base", job.suite.members[0], headless, CPU
        )


def test_bert_scores_are_those_of_the_experts_own_classifier(bert_hub: Path) -> None:
    job = make_job(config(bert_hub))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    copy_into(model, {name: models.source.expert("first", name) for name in models.source.names})
    whole = BertForSequenceClassification.from_pretrained(bert_hub / "first").eval()
    batch = AutoTokenizer.from_pretrained(bert_hub / "base")(
        list(task.samples.inputs), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = job.family.logits(
            model, job.family.features(model, task.collate(list(task.samples.inputs))), task.head
        )
        torch.testing.assert_close(logits, whole(**batch).logits)


def test_clip_scores_are_those_of_the_whole_model_with_one_template(clip_hub: Path) -> None:
    job = make_job(config(clip_hub, "suite.tasks.first.templates=['a photo of a {}']"))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    whole = CLIPModel.from_pretrained(clip_hub / "base").eval()
    texts = [f"a photo of a {name}" for name in ("red", "blue", "green")]
    processor = CLIPProcessor.from_pretrained(clip_hub / "base")
    inputs = processor(text=texts, images=list(task.samples.inputs), return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = whole(**inputs).logits_per_image / whole.logit_scale.exp() * 100
        logits = job.family.logits(
            model, job.family.features(model, task.collate(list(task.samples.inputs))), task.head
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_an_expert_of_the_same_shapes_but_other_settings_is_refused(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: Path = request.getfixturevalue(f"{name}_hub")
    shutil.copytree(hub / "first", tmp_path / "first")
    settings = json.loads((tmp_path / "first" / "config.json").read_text())
    settings["num_attention_heads"] = 4
    (tmp_path / "first" / "config.json").write_text(json.dumps(settings))
    job = make_job(config(hub, f"suite.tasks.first.expert={tmp_path / 'first'}"))
    with pytest.raises(ModelError, match="num_attention_heads is 4 in its config and 2 in the base's"):
        steps.open_models(job)


def test_the_heads_of_a_checkpoint_are_those_of_the_run(clip_hub: Path, tmp_path: Path) -> None:
    checkpoint = run_in(tmp_path, clip_hub, "eval.stages=[]")
    job = make_job(config(clip_hub))
    models, model, _ = steps.open_models(job)
    heads = read_heads(checkpoint, job.suite, job.family, CPU)
    for task in steps.prepare_tasks(job, model, models):
        assert torch.equal(heads[task.name]["weight"], task.head["weight"])
