"""Oracles: the experts and hidden states of transformers, and invariants of walks under feature guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.walk import Walk as Engine
from epmq_cli.families.structure import Linears, Norm
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.none import NoQuantizer
from tests.helpers.hubs import Walk, config, walk
from tests.helpers.tiers import first

FEATURE = ("guidance=feature", "guidance.heads=never", "guidance.safe=false", "quant=none")


def hub_of(name: str, request: pytest.FixtureRequest) -> Path:
    hub: Path = request.getfixturevalue(f"{name}_hub")
    return hub


def student_state(found: Walk) -> dict[str, Tensor]:
    return dict(found.student.state_dict())


def changed_names(one: Walk, other: Walk) -> set[str]:
    """The names of the tensors that differ."""
    return {name for name, tensor in student_state(one).items() if not torch.equal(tensor, student_state(other)[name])}


def expert_features(hub: Path, found: Walk, task: str) -> Tensor:
    job = make_job(config(hub))
    models, model, _ = steps.open_models(job)
    copy_into(model, models.source.model(task))
    return guide.features(job.family, model, found.batches[task])


@pytest.mark.parametrize("beta", first(1, [1, 0]))
@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_one_expert_without_anchor_is_reproduced(name: str, beta: int, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    options = [*FEATURE, "merge=none", "guidance.rho=1", f"guidance.beta={beta}", "~suite.tasks.second"]
    found, before = walk(hub, *options, "guidance.lam=1e-7"), walk(hub, *options, "guidance.lam=1e9")
    wanted = expert_features(hub, found, "first")
    start = (before.features(before.student) - wanted).norm() / wanted.norm()
    end = (found.features(found.student) - wanted).norm() / wanted.norm()
    assert start > 0.3
    assert end < 0.002 * start


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_teachers_have_the_hidden_states_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    job = make_job(config(hub, *FEATURE))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    reference = guide.references(job, model, merged)
    student = Student(model, job.family, reference, job.guidance, dtype)
    engine = Engine(student, Chunks(batches), lambda _: NoQuantizer())
    seen: list[Tensor] = []
    section = engine._section

    def spied(*arguments: object, **options: object) -> None:
        seen.append(engine.teacher_streams["second"][0].hidden.clone())
        section(*arguments, **options)  # type: ignore[arg-type]

    engine._section = spied  # type: ignore[method-assign]
    with torch.inference_mode():
        engine.run()
        copy_into(model, {name: models.source.expert("second", name) for name in models.source.names})
        tower = model.vision_model if name == "clip" else model
        hidden = tower(**batches["second"][0], output_hidden_states=True).hidden_states  # type: ignore[operator]
    assert len(seen) == len(hidden) == 3  # two blocks and the readout
    for mine, own in zip(seen, hidden, strict=True):
        torch.testing.assert_close(mine, own)


def parts(found: Walk) -> dict[str, set[str]]:
    """The tensors that each option controls."""
    model, family = found.student, found.job.family
    readout = family.readout(model)
    sections = [*family.blocks(model), readout]
    linears = {section.name(name) for section in sections for name in section.linears}
    norms = {section.name(step.name) for section in sections for step in section.steps if isinstance(step, Norm)}
    norms.add(str(family.stacks(model)[0].first_norm))
    stem = {name for name, _ in model.named_parameters() if "embeddings." in name and "text" not in name}
    names = {name for name, _ in model.named_parameters()}
    return {
        "norms": {f"{name}.{part}" for name in norms for part in ("weight", "bias")},
        "embeddings": {name for name in stem if name.rsplit(".", 1)[0] not in norms},
        "readout": {readout.name(name) for name in readout.module.state_dict()},
        "intercepts": {f"{name}.bias" for name in linears} & names,
        "weights": {f"{name}.weight" for name in linears},
    }


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_every_part_is_solved_unless_it_is_switched_off(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    full, merged = walk(hub, *FEATURE), walk(hub, "guidance=merged", "quant=none")
    solved = changed_names(full, merged)
    assert solved == set().union(*parts(full).values())
    for option in ("norms", "embeddings", "readout", "intercepts"):
        without = walk(hub, *FEATURE, f"guidance.{option}=false")
        assert solved - changed_names(without, merged) == parts(full)[option], option


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_tokens_that_the_head_does_not_read_count_less_in_the_last_block(
    name: str, request: pytest.FixtureRequest
) -> None:
    even, weighted = (walk(hub_of(name, request), *FEATURE, f"guidance.readout_weight={w}") for w in (1, 0.01))
    last, readout = even.job.family.blocks(even.student)[-1], even.job.family.readout(even.student)
    mixing = {n for step in last.steps if isinstance(step, Linears) for n in step.mixing}
    mixing |= {step.name for step in last.steps if isinstance(step, Norm) and step.mixing}
    wanted = {last.name(n) for n in last.module.state_dict() if n.rsplit(".", 1)[0] not in mixing}
    assert changed_names(even, weighted) == wanted | {readout.name(n) for n in readout.module.state_dict()}


def test_padding_changes_nothing_under_feature_guidance(bert_hub: Path) -> None:
    alone, padded = (walk(bert_hub, *FEATURE, "guidance.lam=0.05", f"calib.batch_size={size}") for size in (1, 24))
    assert any((batch["attention_mask"] == 0).any() for batch in padded.batches["first"])
    for name, tensor in student_state(alone).items():
        torch.testing.assert_close(tensor, student_state(padded)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_order_of_tasks_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    forward, job = walk(hub, *FEATURE), make_job(config(hub, *FEATURE))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    turned = dict(reversed(batches.items()))
    guide.calibrate(RunContext.of(job), model, turned, [], merged)
    for part, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, student_state(forward)[part], rtol=1e-3, atol=1e-4)


def test_a_task_of_weight_zero_has_no_effect(clip_hub: Path) -> None:
    silent = walk(clip_hub, *FEATURE, "+guidance.weights.second=0", "guidance.rho=1", "merge=none")
    alone = walk(clip_hub, *FEATURE, "~suite.tasks.second", "guidance.rho=1", "merge=none")
    for name, tensor in student_state(silent).items():
        torch.testing.assert_close(tensor, student_state(alone)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_asymmetric_guidance_is_closer_to_the_dense_model_than_plain_gptq(
    name: str, request: pytest.FixtureRequest
) -> None:
    hub = hub_of(name, request)
    dense = walk(hub, "guidance=merged", "quant=none")
    wanted = dense.features(dense.student)

    def error(*options: str) -> float:
        found = walk(hub, *options, "quant.grid=mse")
        return float((found.features(found.student) - wanted).norm() / wanted.norm())

    plain, gptaq = error("guidance=merged", "bits=3"), ("guidance=merged", "guidance.alpha=1", "guidance.lam=0.001")
    assert error("guidance=asymmetric", "bits=3") < 0.5 * plain
    assert error(*gptaq, "bits=3") < 0.9 * plain
    assert error("guidance=asymmetric", "bits=8") < 1e-3 < plain
    assert error(*gptaq, "bits=8") < 2e-3


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_without_a_quantizer_asymmetric_guidance_leaves_the_model_as_it_is(
    name: str, request: pytest.FixtureRequest
) -> None:
    hub = hub_of(name, request)
    merged, found = (walk(hub, f"guidance={guidance}", "quant=none") for guidance in ("merged", "asymmetric"))
    for part, tensor in student_state(merged).items():
        torch.testing.assert_close(student_state(found)[part], tensor, rtol=1e-6, atol=1e-7)
