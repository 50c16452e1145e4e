"""Oracles: the experts loaded by transformers, and what the checkpoint and metrics.json hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel

from epmq_cli import calibration as guide
from epmq_cli import pipeline as steps
from epmq_cli.calibrate.reference import install, installed
from epmq_cli.merge.apply import merge_models
from tests.conftest import Run
from tests.hubs import config, run_in


def test_teachers_features_are_those_of_the_experts_themselves(bert_hub: Path) -> None:
    job = steps.make_job(config(bert_hub, "guidance=feature"))
    models, model, _ = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    taught = guide.teach(job, model, models.source, batches)
    expert = BertForSequenceClassification.from_pretrained(bert_hub / "second").bert.eval()
    with torch.inference_mode():
        wanted = torch.cat([expert(**batch).pooler_output for batch in batches["second"]])
    torch.testing.assert_close(taught["second"], wanted)


def test_nothing_is_taught_where_nothing_asks_for_it(clip_hub: Path) -> None:
    job = steps.make_job(config(clip_hub, "guidance=feature"))  # heads: own, and a CLIP has none of its own
    models, model, _ = steps.open_models(job)
    assert guide.teach(job, model, models.source, steps.calibration_batches(job, models.base.path)) == {}


@pytest.mark.parametrize(
    ("hub", "heads", "solved"),
    [
        ("bert", "own", True),
        ("clip", "own", False),
        ("clip", "always", True),
        ("bert", "never", False),
    ],
)
def test_heads_are_solved_where_they_shall_be(
    hub: str, heads: str, solved: bool, request: pytest.FixtureRequest
) -> None:
    assert (
        guide.solves_heads(steps.make_job(config(request.getfixturevalue(f"{hub}_hub"), f"guidance.heads={heads}")))
        is solved
    )


def test_auto_leaves_the_model_as_it_was_before_the_walk(clip_hub: Path) -> None:
    job = steps.make_job(config(clip_hub, "guidance=feature", "guidance.rho=auto"))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    tasks = steps.prepare_tasks(job, model, models)
    taught = guide.teach(job, model, models.source, batches)
    install(model, merge_models(models.source, job.merge, dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = guide.references(job, model, models.source)
    choice = guide.settle(job, model, batches, taught, tasks, reference, dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(choice.trials) == 3
    assert choice.guidance.rho == min(choice.trials, key=lambda trial: trial["error"])["rho"]


def test_what_was_chosen_is_in_metrics_json(bert_hub: Path, tmp_path: Path) -> None:
    run_in(tmp_path, bert_hub, "guidance=feature", "guidance.rho=auto", "guidance.heads=own")
    found = json.loads((tmp_path / "metrics.json").read_text())["guidance"]
    assert found["chosen"] == ["rho"]
    assert {trial["rho"] for trial in found["trials"]} == {1.0, 2.0, 3.0}
    assert found["rho"] == min(found["trials"], key=lambda trial: trial["error"])["rho"]
    assert found["heads_solved"] is True


def test_solved_heads_are_in_the_checkpoint_and_suit_its_features(bert_hub: Path, tmp_path: Path) -> None:
    own, again = (
        run_in(tmp_path / heads, bert_hub, "guidance=feature", f"guidance.heads={heads}", "guidance.lam=0.001")
        for heads in ("never", "own")
    )
    before, after = (load_file(folder / "heads.safetensors") for folder in (own, again))
    classifier = load_file(bert_hub / "first" / "model.safetensors")["classifier.weight"]
    assert torch.equal(before["first.weight"], classifier)
    assert not torch.equal(after["first.weight"], classifier)
    expert = BertForSequenceClassification.from_pretrained(bert_hub / "first").eval()
    student = BertModel.from_pretrained(again).eval()
    batches = steps.calibration_batches(steps.make_job(config(bert_hub)), bert_hub / "base")["first"]
    errors = []
    with torch.inference_mode():
        for heads in (before, after):
            error = 0.0
            for batch in batches:
                logits = student(**batch).pooler_output @ heads["first.weight"].T + heads["first.bias"]
                error += float((logits - expert(**batch).logits).square().sum())
            errors.append(error)
    assert errors[1] < 0.8 * errors[0]


def test_a_weight_for_a_task_that_is_not_there_is_refused(bert_hub: Path, tmp_path: Path, epmq_inside: Run) -> None:
    result = epmq_inside(
        "run", "--config-dir", str(bert_hub / "configs"), "suite=mini", "group_size=16", "guidance.weights={frist: 2}"
    )
    assert result.returncode == 1
    assert "guidance.weights has no option 'frist', the options are first, second; did you mean first?" in result.stderr


def test_installed_values_are_gone_after_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), installed(model, {"weight": before + 1}):
        assert torch.equal(model.weight, before + 1)
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)
