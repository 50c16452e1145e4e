"""Oracles: the experts loaded by transformers, and the contents of checkpoint and metrics.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, CLIPModel, CLIPVisionModel

from epmq_cli.calibrate.block_refinement import Chunks
from epmq_cli.calibrate.passes import run_passes
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.tune import GRID
from epmq_cli.checkpoint.task_heads import read_heads
from epmq_cli.data import views
from epmq_cli.data.batching import Batch
from epmq_cli.data.held_out import filled, hold_out
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.evaluate.score import ScoredTask, Scorer
from epmq_cli.families.family import load_model
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into, swapped_weights
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.report.metrics_json import schema
from tests.conftest import Run
from tests.helpers.hubs import config, run_in
from tests.helpers.tiers import first


def opened(hub: Path, *overrides: str) -> tuple[steps.Job, steps.SuiteModels, nn.Module, torch.dtype]:
    job = make_job(config(hub, *overrides))
    return job, *steps.open_models(job)


def expert_features(hub: Path, task: str, batches: list[Batch]) -> Tensor:
    """The features from the expert's own class in transformers."""
    if (hub / "vocab.txt").exists():
        bert = BertForSequenceClassification.from_pretrained(hub / task).bert.eval()
        with torch.inference_mode():
            return torch.cat([bert(**batch).pooler_output for batch in batches])
    tower = CLIPVisionModel.from_pretrained(hub / task).eval()
    projection = CLIPModel.from_pretrained(hub / "base").visual_projection
    with torch.inference_mode():
        return torch.cat([projection(tower(**batch).pooler_output) for batch in batches])


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_teacher_features_are_those_of_the_experts(name: str, request: pytest.FixtureRequest) -> None:
    hub = request.getfixturevalue(f"{name}_hub")
    job, models, model, _ = opened(hub, "guidance=feature", "guidance.heads=always")
    batches = steps.calibration_batches(job, models.base.path)
    taught = guide.run_teachers(RunContext.of(job), model, models.source, batches)
    assert list(taught.features) == ["first", "second"]
    for task, features in taught.features.items():
        torch.testing.assert_close(features, expert_features(hub, task, batches[task]), rtol=1e-4, atol=1e-5)


def test_teachers_do_not_run_if_no_option_needs_them(clip_hub: Path) -> None:
    job = make_job(config(clip_hub, "guidance=feature"))  # heads=own, but CLIP experts have no heads of their own
    models, model, _ = steps.open_models(job)
    drawn = steps.calibration_batches(job, models.base.path)
    assert guide.run_teachers(RunContext.of(job), model, models.source, drawn) == guide.TeacherOutputs(drawn, {})


@pytest.mark.parametrize(
    ("name", "heads", "solved"),
    [
        ("bert", "own", True),
        ("bert", "always", True),
        ("bert", "never", False),
        ("clip", "own", False),
        ("clip", "always", True),
    ],
)
def test_solved_heads_bring_the_logits_closer(
    name: str, heads: str, solved: bool, request: pytest.FixtureRequest
) -> None:
    hub = request.getfixturevalue(f"{name}_hub")
    job, models, model, dtype = opened(hub, "guidance=feature", f"guidance.heads={heads}")
    assert guide.solves_heads(job) is solved
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    taught = guide.run_teachers(RunContext.of(job), model, models.source, batches)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    found = guide.solve_heads(RunContext.of(job), model, taught, tasks, job.guidance)
    assert [task.name for task in found] == ["first", "second"]
    for before, after in zip(tasks, found, strict=True):
        assert before.head.keys() == after.head.keys()
        assert all(torch.equal(before.head[part], after.head[part]) is not solved for part in before.head)
        assert after.samples is before.samples
        if solved:
            own, teacher = guide.features(job.family, model, batches[before.name]), taught.features[before.name]
            wanted = job.family.logits(model, teacher, before.head)
            errors = [(job.family.logits(model, own, task.head) - wanted).square().sum() for task in (before, after)]
            assert errors[1] < 0.5 * errors[0]


def test_a_student_that_is_the_expert_keeps_its_head(bert_hub: Path) -> None:
    job, models, model, _ = opened(bert_hub, "guidance=feature", "~suite.tasks.second")
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    taught = guide.run_teachers(RunContext.of(job), model, models.source, batches)  # leaves the expert in the model
    found = guide.solve_heads(RunContext.of(job), model, taught, tasks, job.guidance)
    assert all(torch.equal(found[0].head[part], tasks[0].head[part]) for part in ("weight", "bias"))


@pytest.mark.parametrize("targets", first(1, ["expert", "merged"]))
@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_auto_minimises_the_hold_out_error_and_keeps_the_model(
    name: str, targets: str, request: pytest.FixtureRequest
) -> None:
    options = ["guidance=feature", "guidance.rho=auto", "guidance.heads=never", f"guidance.targets={targets}"]
    job, models, model, dtype = opened(request.getfixturevalue(f"{name}_hub"), *options)
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    before = {part: tensor.clone() for part, tensor in model.state_dict().items()}
    reference = guide.references(job, model, merged)
    student = Student(model, job.family, reference, job.guidance, dtype)
    choice = guide.tune_guidance(student, guide.HeldOutDivergence(student, batches, tasks))
    assert all(torch.equal(tensor, before[part]) for part, tensor in model.state_dict().items())
    assert [trial["rho"] for trial in choice.trials] == [1, 2, 3]
    least = min(choice.trials, key=lambda trial: trial["divergence"])
    assert choice.guidance == replace(job.guidance, rho=least["rho"])
    assert len({trial["divergence"] for trial in choice.trials}) == 3
    fitted, held = map(filled, hold_out(batches))

    def logits(task: ScoredTask) -> Tensor:
        return job.family.logits(model, guide.features(job.family, model, held[task.name]), task.head)

    expected = {}
    for task in tasks:
        with swapped_weights(model, {part: reference.expert(task.name, part) for part in models.source.names}):
            expected[task.name] = logits(task)
    run_passes(replace(student, guidance=choice.guidance), Chunks(fitted), NoQuantizer())
    divergences = []
    for task in tasks:
        own, wanted = ((rows.double() / 2).log_softmax(-1) for rows in (logits(task), expected[task.name]))
        divergences.append(4 * float((wanted.exp() * (wanted - own)).sum(-1).mean()))
    assert sum(divergences) / 2 == pytest.approx(least["divergence"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "bert"])
def test_during_tuning_a_plain_model_reproduces_its_teacher(name: str, request: pytest.FixtureRequest) -> None:
    """Trials do not quantize, so a student whose target is the merged model reproduces it."""
    options = ["guidance=asymmetric", "guidance.lam=auto"]
    job, models, model, dtype = opened(request.getfixturevalue(f"{name}_hub"), *options)
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    found = guide.calibrate(RunContext.of(job), model, batches, tasks, merged)
    assert found.choice is not None
    assert max(trial["divergence"] for trial in found.choice.trials) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_tuned_options_are_used_and_recorded_in_metrics_json(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub = request.getfixturevalue(f"{name}_hub")
    checkpoint = run_in(tmp_path / "auto", hub, "guidance=feature", "guidance.lam=auto", "eval.samples=5")
    metrics = json.loads((tmp_path / "auto" / "metrics.json").read_text())
    jsonschema.validate(metrics, schema())
    found = metrics["guidance"]
    assert found["chosen"] == ["lam"]
    assert sorted(trial["lam"] for trial in found["trials"]) == sorted(GRID["lam"])
    assert found["lam"] == min(found["trials"], key=lambda trial: trial["divergence"])["lam"]
    assert found["heads_solved"] is (name == "bert")
    given = run_in(tmp_path / "given", hub, "guidance=feature", f"guidance.lam={found['lam']}", "eval.samples=5")
    for file in ("model.safetensors", "heads/heads.safetensors"):
        assert (checkpoint / file).read_bytes() == (given / file).read_bytes()


def test_solved_heads_are_stored_and_match_the_features(bert_hub: Path, tmp_path: Path) -> None:
    own, again = (
        run_in(tmp_path / heads, bert_hub, "guidance=feature", f"guidance.heads={heads}", "guidance.lam=0.001")
        for heads in ("never", "own")
    )
    before, after = (load_file(folder / "heads/heads.safetensors") for folder in (own, again))
    classifier = load_file(bert_hub / "first" / "model.safetensors")["classifier.weight"]
    assert torch.equal(before["first.weight"], classifier)
    assert not torch.equal(after["first.weight"], classifier)
    expert = BertForSequenceClassification.from_pretrained(bert_hub / "first").eval()
    student = BertModel.from_pretrained(again).eval()
    batches = steps.calibration_batches(make_job(config(bert_hub)), bert_hub / "base")["first"]
    errors = []
    with torch.inference_mode():
        for heads in (before, after):
            error = 0.0
            for batch in batches:
                logits = student(**batch).pooler_output @ heads["first.weight"].T + heads["first.bias"]
                error += float((logits - expert(**batch).logits).square().sum())
            errors.append(error)
    assert errors[1] < 0.8 * errors[0]


def test_a_weight_for_an_unknown_task_is_refused(bert_hub: Path, tmp_path: Path, epmq_inside: Run) -> None:
    result = epmq_inside(
        "run", "--config-dir", str(bert_hub / "configs"), "suite=mini", "group_size=16", "guidance.weights={frist: 2}"
    )
    assert result.returncode == 1
    assert "guidance.weights has no option 'frist', the options are first, second; did you mean first?" in result.stderr


@pytest.mark.parametrize(("name", "heads"), first(1, [("bert", "own"), ("clip", "always")]))
def test_epmq_eval_scores_the_solved_heads(
    name: str, heads: str, request: pytest.FixtureRequest, tmp_path: Path, epmq_inside: Run
) -> None:
    hub = request.getfixturevalue(f"{name}_hub")
    checkpoint = run_in(tmp_path / "run", hub, "guidance=feature", f"guidance.heads={heads}", "eval.stages=[quantized]")
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]["tasks"]
    job, models, model, _ = opened(hub)
    tasks = steps.prepare_tasks(job, model, models)
    solved = read_heads(checkpoint, job.suite, job.family, torch.device("cpu"))
    student = load_model(job.family, checkpoint, torch.device("cpu"))
    for task in tasks:
        assert not torch.equal(solved[task.name]["weight"], task.head["weight"])
        again = replace(task, head=solved[task.name])
        scorer = Scorer(job.evaluation, job.family, torch.device("cpu"))
        assert scorer.score(student, again).value == scores[task.name]["quantized"]
    result = epmq_inside("eval", str(checkpoint), "out=there")
    assert result.returncode == 0, result.stderr
    evaluated = json.loads((tmp_path / "there" / "metrics.json").read_text())["scores"]["tasks"]
    assert evaluated == scores
    flipped = {f"{task}.{part}": -x for task, head in solved.items() for part, x in head.items()}
    save_file(flipped, checkpoint / "heads/heads.safetensors")
    assert epmq_inside("eval", str(checkpoint), "out=other").returncode == 0
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["scores"]["tasks"] != scores


def test_too_few_samples_for_a_hold_out_are_refused_in_one_sentence(clip_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task first has 4 calibration samples, but an auto option needs 5"):
        run_in(tmp_path, clip_hub, "guidance.lam=auto", "calib.samples=4")


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_zero_weights_without_an_anchor_are_refused_by_name(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    silent = ("+guidance.weights.first=0", "+guidance.weights.second=0")
    with pytest.raises(ConfigError, match="guidance.weights"):
        run_in(tmp_path, request.getfixturevalue(f"{name}_hub"), "guidance=feature", "guidance.lam=0", *silent)


def test_views_count_as_further_samples(clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("guidance=feature", "quant=none", "eval.stages=[]")

    def weights(name: str, *more: str) -> dict[str, Tensor]:
        run_in(tmp_path / name, clip_hub, *options, *more)
        return load_file(tmp_path / name / "checkpoint" / "model.safetensors")

    one, three = weights("one"), weights("three", "calib.views=3")
    assert any(not torch.equal(one[name], three[name]) for name in one)
    monkeypatch.setattr(views, "view", lambda batch, seed, number: batch)  # the same samples three times
    torch.testing.assert_close(weights("same", "calib.views=3"), one, rtol=1e-2, atol=2e-3)  # rounded to float16
