"""Oracles: least squares on one-hot inputs, the convolution itself, and experts that the student must reproduce."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, unfold

from epmq_cli.calibrate.embeddings import _joined, _lookups, _patch_rows, solve_stem, solved_table
from epmq_cli.calibrate.student import Student
from epmq_cli.families.structure import Table
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import swapped_weights
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config

ROWS, WIDTH = 8, 6


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_of(hub: Path, *overrides: str) -> tuple[Student, dict[str, list[dict[str, Tensor]]]]:
    """The base model under feature guidance, and the calibration batches."""
    job = make_job(config(hub, "guidance=feature", *overrides))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    merged = LazyMerge(models.source, job.merge, dtype)
    return Student(model, job.family, guide.references(job, model, merged), job.guidance, dtype), batches


def test_a_table_is_least_squares_of_one_hot_inputs() -> None:
    anchor, experts = rand(ROWS, WIDTH, seed=0), [rand(ROWS, WIDTH, seed=t) for t in (1, 2)]
    counts = [torch.tensor([3.0, 0, 1, 2, 5, 1, 0, 0]).double(), torch.tensor([1.0, 2, 0, 2, 0, 1, 4, 0]).double()]
    lam = 0.1
    inputs = torch.cat([c.sqrt().diag() for c in counts] + [lam**0.5 * torch.eye(ROWS, dtype=torch.float64)])
    outputs = torch.cat([c.sqrt().diag() @ e for c, e in zip(counts, experts, strict=True)] + [lam**0.5 * anchor])
    direct = torch.linalg.lstsq(inputs, outputs).solution
    torch.testing.assert_close(solved_table(anchor, experts, counts, lam), direct)


def test_rows_without_lookups_keep_the_anchor() -> None:
    anchor, expert = rand(ROWS, WIDTH, seed=0), rand(ROWS, WIDTH, seed=1)
    counts = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]).double()
    found = solved_table(anchor, [expert], [counts], 0.0)
    assert torch.equal(found[1], anchor[1])
    torch.testing.assert_close(found[0], expert[0])


def test_lookups_of_padding_do_not_count(bert_hub: Path) -> None:
    student, batches = student_of(bert_hub)
    group = batches["first"]
    rows = student.model.get_parameter("embeddings.word_embeddings.weight").shape[0]
    words = _lookups(
        student, group, Table("embeddings.word_embeddings"), rows, student.family.stacks(student.model)[0].mask
    )
    real = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in group])
    assert torch.equal(words, torch.bincount(real, minlength=rows).double())
    places = _lookups(
        student, group, Table("embeddings.position_embeddings"), 32, student.family.stacks(student.model)[0].mask
    )
    assert places[0] == sum(len(batch["input_ids"]) for batch in group)
    assert places.sum() == words.sum()


def test_patches_are_the_inputs_of_the_convolution(clip_hub: Path) -> None:
    student, batches = student_of(clip_hub)
    tower = student.model.vision_model.embeddings
    pixels = batches["first"][0]
    rows = _patch_rows(student, pixels, "vision_model.embeddings.patch_embedding")
    linear = _joined(tower.patch_embedding.weight, tower.position_embedding.weight[1:])  # type: ignore[union-attr, arg-type, index]
    with torch.inference_mode():
        wanted = tower(pixels["pixel_values"])[:, 1:].flatten(0, 1)  # type: ignore[operator]
    torch.testing.assert_close(rows @ linear.T, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_stem_of_a_lone_expert_is_reproduced(name: str, request: pytest.FixtureRequest) -> None:
    student, batches = student_of(
        request.getfixturevalue(f"{name}_hub"), "guidance.lam=1e-9", "~suite.tasks.second", "calib.samples=40"
    )
    with torch.inference_mode():
        solve_stem(student, student.family.stacks(student.model)[0], batches, batches)
    if name == "clip":
        tower = student.model.vision_model.embeddings
        pixels = batches["first"][0]["pixel_values"]
        with torch.inference_mode():
            found = tower(pixels)  # type: ignore[operator]
            with swapped_weights(
                student.model, {n: student.expert("first", n) for n in student.reference.names(("x",))}
            ):
                torch.testing.assert_close(found, tower(pixels), rtol=1e-3, atol=1e-3)  # type: ignore[operator]
        return
    used = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches["first"]]).unique()
    table = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(student.own(table)[used], student.expert("first", table)[used], rtol=1e-4, atol=1e-4)


def objective(student: Student, batches: dict[str, list[dict[str, Tensor]]], tensors: dict[str, Tensor]) -> Tensor:
    """The squared distance between the student's convolution plus positions and those of each expert, and from the
    anchor."""
    kernel, places = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))
    lam = float(student.guidance.lam)
    total = sum(lam * (tensors[name] - student.own(name).double()).square().sum() for name in tensors)
    assert isinstance(total, Tensor)
    for task, group in batches.items():
        images = torch.cat([batch["pixel_values"] for batch in group]).double()
        delta = {name: tensors[name] - student.expert(task, name).double() for name in tensors}
        error = conv2d(images, delta[kernel], stride=8).flatten(2).transpose(1, 2) + delta[places][1:]
        rows = unfold(images, 8, stride=8).transpose(1, 2)
        rows = torch.cat([rows, torch.eye(rows.shape[1]).double().expand(len(rows), -1, -1)], 2).flatten(0, 1)
        s = student.guidance.factor(task) / torch.linalg.norm(rows.T @ rows)
        total = total + s * error.square().sum() + student.guidance.factor(task) * delta[places][0].square().sum()
    return total


def test_patches_and_positions_minimise_the_written_out_objective(clip_hub: Path) -> None:
    options = ("guidance.lam=0.03", "+guidance.weights.second=3")
    (anchored, batches), (student, _) = student_of(clip_hub, *options), student_of(clip_hub, *options)
    with torch.inference_mode():
        solve_stem(student, student.family.stacks(student.model)[0], batches, batches)
    names = [f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position")]
    slopes = []
    for owner in (student, anchored):
        tensors = {name: owner.own(name).double().requires_grad_() for name in names}
        slopes.append(torch.autograd.grad(objective(anchored, batches, tensors), list(tensors.values())))
    for here, there in zip(*slopes, strict=True):
        assert here.norm() < 1e-5 * there.norm()


def test_the_class_token_is_the_mean_of_the_experts_and_the_anchor(clip_hub: Path) -> None:
    student, batches = student_of(clip_hub, "guidance.lam=0.5", "+guidance.weights.second=3")
    name = "vision_model.embeddings.class_embedding"
    own, first, second = student.own(name), student.expert("first", name), student.expert("second", name)
    with torch.inference_mode():
        solve_stem(student, student.family.stacks(student.model)[0], batches, batches)
    torch.testing.assert_close(student.own(name), (0.5 * own + first + 3 * second) / 4.5)


def test_tables_minimise_the_written_out_objective(bert_hub: Path) -> None:
    student, batches = student_of(bert_hub, "guidance.lam=0.03", "+guidance.weights.second=3")
    name = "embeddings.word_embeddings.weight"
    anchor = student.own(name).double()
    with torch.inference_mode():
        solve_stem(student, student.family.stacks(student.model)[0], batches, batches)
    slopes = []
    for at in (student.own(name).double(), anchor):
        table = at.clone().requires_grad_()
        total = 0.03 / len(table) * (table - anchor).square().sum()
        for task, factor in (("first", 1), ("second", 3)):
            words = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches[task]])
            error = table[words] - student.expert(task, name).double()[words]
            total = total + factor / len(words) * error.square().sum()
        slopes.append(torch.autograd.grad(total, table)[0])
    assert slopes[0].norm() < 1e-5 * slopes[1].norm()
