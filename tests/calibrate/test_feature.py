"""Oracles: experts and hidden states as transformers has them, and invariants of walks under feature guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli import calibration as guide
from epmq_cli import pipeline as steps
from epmq_cli.calibrate.reference import Reference, install
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.walk import _Walk
from epmq_cli.merge.apply import merge_models
from epmq_cli.quantize.none import NoQuantizer
from tests.hubs import Walk, config, walk

FEATURE = ("guidance=feature", "guidance.heads=never", "quant=none")


def hub_of(name: str, request: pytest.FixtureRequest) -> Path:
    hub: Path = request.getfixturevalue(f"{name}_hub")
    return hub


def state(found: Walk) -> dict[str, Tensor]:
    return dict(found.student.state_dict())


def changed(one: Walk, other: Walk) -> set[str]:
    """The names of the tensors that differ."""
    return {name for name, tensor in state(one).items() if not torch.equal(tensor, state(other)[name])}


def expert_features(hub: Path, found: Walk, task: str) -> Tensor:
    job = steps.make_job(config(hub))
    models, model, _ = steps.open_models(job)
    install(model, {name: models.source.expert(task, name) for name in models.source.names})
    return guide.features(job.family, model, found.batches[task])


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_one_expert_without_anchor_is_reproduced(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    options = [*FEATURE, "merge=none", "guidance.lam=1e-7", "guidance.rho=1", "~suite.tasks.second"]
    found, before = walk(hub, *options), walk(hub, *options, "guidance=merged", "guidance.lam=0")
    wanted = expert_features(hub, found, "first")
    start = (before.features(before.student) - wanted).norm() / wanted.norm()
    end = (found.features(found.student) - wanted).norm() / wanted.norm()
    assert start > 0.05
    assert end < 0.01 * start


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_teachers_walk_through_transformers_own_hidden_states(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    job = steps.make_job(config(hub, *FEATURE))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    install(model, merge_models(models.source, job.merge, dtype))
    reference = guide.references(job, model, models.source)
    engine = _Walk(Student(model, job.family, reference, job.guidance, dtype), batches, lambda _: NoQuantizer())
    seen: list[Tensor] = []
    section = engine._section

    def spied(*arguments: object, **options: object) -> None:
        seen.append(engine.taught["second"][0].hidden.clone())
        section(*arguments, **options)  # type: ignore[arg-type]

    engine._section = spied  # type: ignore[method-assign]
    with torch.inference_mode():
        engine.run()
        install(model, {name: models.source.expert("second", name) for name in models.source.names})
        tower = model.vision_model if name == "clip" else model
        hidden = tower(**batches["second"][0], output_hidden_states=True).hidden_states  # type: ignore[operator]
    assert len(seen) == len(hidden) == 3  # two blocks and the readout
    for mine, own in zip(seen, hidden, strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize(
    ("option", "touched"),
    [
        ("norms", ("layer_norm", "layrnorm", "layernorm")),
        ("embeddings", ("embeddings.",)),
        ("readout", ("post_layernorm", "visual_projection")),
        ("intercepts", (".bias",)),
    ],
)
def test_parts_that_are_switched_off_keep_the_merged_values(
    option: str, touched: tuple[str, ...], clip_hub: Path
) -> None:
    full, without = walk(clip_hub, *FEATURE), walk(clip_hub, *FEATURE, f"guidance.{option}=false")
    merged = walk(clip_hub, "guidance=merged", "quant=none")
    own = {"norms": "encoder", "readout": "", "embeddings": "", "intercepts": "_proj.bias"}[option]
    names = [name for name in state(full) if any(part in name for part in touched) and own in name]
    names = [name for name in names if name.startswith("vision_model.") or name == "visual_projection.weight"]
    names = [name for name in names if "position_ids" not in name]
    assert names
    assert set(names) <= changed(full, merged)
    assert not set(names) & changed(without, merged)


def test_tokens_that_are_not_read_count_in_the_last_block_alone(clip_hub: Path) -> None:
    even, weighted = (walk(clip_hub, *FEATURE, f"guidance.readout_weight={weight}") for weight in (1, 0.01))
    differing = changed(even, weighted)
    assert "vision_model.encoder.layers.1.self_attn.q_proj.weight" in differing
    assert "vision_model.encoder.layers.1.mlp.fc2.weight" in differing
    for part in ("self_attn.k_proj", "self_attn.v_proj", "layer_norm1"):
        assert f"vision_model.encoder.layers.1.{part}.weight" not in differing
    assert not any("layers.0." in name or "embeddings" in name for name in differing)


def test_padding_changes_nothing_under_feature_guidance(bert_hub: Path) -> None:
    alone, padded = (walk(bert_hub, *FEATURE, "guidance.lam=0.05", f"calib.batch_size={size}") for size in (1, 24))
    assert any((batch["attention_mask"] == 0).any() for batch in padded.batches["first"])
    for name, tensor in state(alone).items():
        torch.testing.assert_close(tensor, state(padded)[name], rtol=1e-3, atol=1e-4)


def test_order_of_tasks_changes_nothing(clip_hub: Path) -> None:
    forward = walk(clip_hub, *FEATURE)
    job = steps.make_job(config(clip_hub, *FEATURE))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    install(model, merge_models(models.source, job.merge, dtype))
    turned = dict(reversed(batches.items()))
    guide.calibrate(job, model, turned, {}, [], models.source, dtype)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state(forward)[name], rtol=1e-3, atol=1e-4)


def test_a_task_of_weight_zero_has_no_say(clip_hub: Path) -> None:
    silent = walk(clip_hub, *FEATURE, "+guidance.weights.second=0", "guidance.rho=1", "merge=none")
    alone = walk(clip_hub, *FEATURE, "~suite.tasks.second", "guidance.rho=1", "merge=none")
    for name, tensor in state(silent).items():
        torch.testing.assert_close(tensor, state(alone)[name], rtol=1e-4, atol=1e-5)


def test_a_second_sweep_is_anchored_at_the_first(clip_hub: Path) -> None:
    once, twice = walk(clip_hub, *FEATURE), walk(clip_hub, *FEATURE, "guidance.sweeps=2")
    strong = walk(clip_hub, *FEATURE, "guidance.sweeps=2", "guidance.lam=1e9", "guidance.rho=1")
    merged = walk(clip_hub, "guidance=merged", "quant=none")
    assert changed(once, twice)
    for name, tensor in state(strong).items():
        torch.testing.assert_close(tensor, state(merged)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_asymmetric_guidance_is_nearer_to_the_dense_model_than_plain_gptq(
    name: str, request: pytest.FixtureRequest
) -> None:
    hub = hub_of(name, request)
    dense = walk(hub, "guidance=merged", "quant=none")
    wanted = dense.features(dense.student)
    plain, asymmetric = (walk(hub, f"guidance={guidance}", "bits=3") for guidance in ("merged", "asymmetric"))
    errors = [(found.features(found.student) - wanted).norm() for found in (plain, asymmetric)]
    assert errors[1] < errors[0]


def test_a_tensor_that_no_expert_has_is_the_same_for_all(clip_hub: Path) -> None:
    models, model, _ = steps.open_models(steps.make_job(config(clip_hub)))
    projection = model.get_parameter("visual_projection.weight")
    name = "vision_model.post_layernorm.weight"
    reference = Reference(models.source, {"visual_projection.weight": projection}, None)
    assert reference.expert("first", "visual_projection.weight") is projection
    assert torch.equal(reference.expert("first", name), models.source.expert("first", name))
    plain = Reference(models.source, {}, {name: projection})
    assert plain.expert("first", name) is projection
