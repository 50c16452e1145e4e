"""Oracles: the definition of the anchor, and the values in the model files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.calibrate.student import Student
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config

LINEAR = "vision_model.encoder.layers.0.mlp.fc1"


def student_of(hub: Path, *overrides: str) -> Student:
    job = make_job(config(hub, *overrides))
    models, model, dtype = steps.open_models(job)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    return Student(model, job.family, guide.references(job, model, merged), job.guidance, dtype)


@pytest.mark.parametrize("rho", [0, 0.5, 1, 3])
def test_the_anchor_goes_from_the_base_through_the_merge(rho: float, clip_hub: Path) -> None:
    student = student_of(clip_hub, f"guidance.rho={rho}")
    base, merged = student.reference.base(f"{LINEAR}.bias"), student.own(f"{LINEAR}.bias")
    found = student.affine_anchor(LINEAR)
    torch.testing.assert_close(found.bias, base + rho * (merged - base))
    assert not torch.equal(base, merged)
    assert torch.equal(student.own(f"{LINEAR}.weight"), found.weight) is (rho == 1)


def test_without_extrapolation_the_anchor_is_the_model_bit_for_bit(clip_hub: Path) -> None:
    student = student_of(clip_hub)
    assert torch.equal(student.anchor(f"{LINEAR}.weight"), student.model.get_parameter(f"{LINEAR}.weight"))


def test_own_returns_copies(clip_hub: Path) -> None:
    student = student_of(clip_hub)
    own = student.own(f"{LINEAR}.bias")
    student.put_affine(LINEAR, torch.zeros_like(student.own(f"{LINEAR}.weight")), own + 1)
    assert torch.equal(student.own(f"{LINEAR}.bias"), own + 1)
    assert not student.own(f"{LINEAR}.weight").any()


def test_a_missing_bias_stays_unchanged(clip_hub: Path) -> None:
    student = student_of(clip_hub)
    own = student.own(f"{LINEAR}.bias")
    student.put_affine(LINEAR, torch.zeros_like(student.own(f"{LINEAR}.weight")), None)
    assert torch.equal(student.own(f"{LINEAR}.bias"), own)


def test_a_linear_without_bias_has_none_in_anchor_and_expert(clip_hub: Path) -> None:
    student = student_of(clip_hub)
    assert student.affine_anchor("visual_projection").bias is None
    assert student.affine_expert("first", "visual_projection").bias is None
    assert student.affine_expert("first", LINEAR).bias is not None


def test_put_rounds_to_the_stored_type(clip_hub: Path) -> None:
    student = student_of(clip_hub, "pack.dtype=bfloat16")
    value = torch.full_like(student.own(f"{LINEAR}.bias"), 1.001)
    student.put({f"{LINEAR}.bias": value})
    assert torch.equal(student.own(f"{LINEAR}.bias"), torch.ones_like(value))
    assert student.own(f"{LINEAR}.bias").dtype == torch.float32


@pytest.mark.parametrize(("targets", "own"), [("expert", True), ("merged", False)])
def test_experts_are_the_merged_model_if_that_is_the_target(targets: str, own: bool, clip_hub: Path) -> None:
    student = student_of(clip_hub, f"guidance.targets={targets}")
    merged = student.own(f"{LINEAR}.weight")
    experts = [student.affine_expert(task, LINEAR).weight for task in ("first", "second")]
    assert [torch.equal(expert, merged) for expert in experts] == [not own] * 2
    assert torch.equal(*experts) is not own
    student.put({f"{LINEAR}.weight": 0 * merged})  # the targets do not follow the student
    assert torch.equal(student.affine_expert("first", LINEAR).weight, experts[0])
