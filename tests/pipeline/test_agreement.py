"""Oracles: the definition of KL, a model that is the expert itself, and a checkpoint that is loaded again."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from epmq_cli.families.family import load_model
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.agreement import Agreement
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.table import agreement_lines
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import build
from tests.helpers.talks import talking
from tests.helpers.tiers import only


@pytest.mark.parametrize("kind", only(("llama",), ("llama", "vit", "t5", "electra")))
def test_a_model_agrees_with_itself_and_less_with_others(kind: str, tmp_path: Path) -> None:
    hub = build(tmp_path, kind)
    job = make_job(config(hub))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)
    found = Agreement.of(RunContext.of(job), model, tasks, models.source)
    copy_into(model, models.source.model("first"))
    found.measure("first", tasks[:1])
    assert found.stages["first"]["first"] == pytest.approx({"kl": 0, "top1": 1}, abs=1e-6)
    found.measure("other", tasks[1:])
    assert found.stages["other"]["second"]["kl"] > 1e-6


def test_answers_alone_are_compared_if_the_loss_counted_these(tmp_path: Path) -> None:
    """Oracle: the definition of KL, of the tokens in front of those of answers."""
    hub = talking(tmp_path / "hub")
    job = make_job(config(hub, "+suite.each={assistant_only_loss: true}"))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)[:1]
    found = Agreement.of(RunContext.of(job), model, tasks, models.source)
    expert = deepcopy(model)  # which `of` ran last
    found.measure("merged", tasks)
    copy_into(model, models.source.model("second"))
    found.measure("quantized", tasks)
    assert tasks[0].text is not None
    windows = [window for window in tasks[0].text.split(12) if len(window) == 12 and window[1:, 1].any()]
    divergences: list[torch.Tensor] = []
    for ids, marks in (window.T for window in windows[:64]):
        with torch.inference_mode():
            wanted, own = (each(input_ids=ids[None]).logits[0].double().log_softmax(-1) for each in (expert, model))
        divergences += list((wanted.exp() * (wanted - own)).sum(-1)[:-1][marks[1:] == 1])
    assert found.entry["first"]["merged"] == pytest.approx({"kl": 0, "top1": 1}, abs=1e-6)
    assert found.entry["first"]["quantized"]["kl"] == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3)


def test_runs_report_the_divergence_of_merge_and_result(bert_hub: Path, tmp_path: Path) -> None:
    """Of a classifier all classes are kept, so KL is that of the probabilities."""
    checkpoint = run_in(tmp_path / "run", bert_hub, "bits=2", "guidance=merged", "quant=rtn")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    job = make_job(config(bert_hub))
    models, model, _ = steps.open_models(job)
    task = steps.prepare_tasks(job, model, models)[0]
    copy_into(model, models.source.model("first"))
    student = load_model(job.family, checkpoint, torch.device("cpu"))
    batch = task.collate(list(task.samples.inputs)[:64])
    with torch.inference_mode():
        wanted, own = (
            job.family.logits(each, job.family.features(each, batch), task.head).double().log_softmax(-1)
            for each in (model, student)
        )
    entry = metrics["agreement"]["first"]["quantized"]
    assert entry["kl"] == pytest.approx(float((wanted.exp() * (wanted - own)).sum(-1).mean()), rel=1e-3)
    assert entry["top1"] == pytest.approx(float((wanted.argmax(-1) == own.argmax(-1)).double().mean()))


def test_the_summary_says_where_guidance_made_it_worse() -> None:
    better = {"a": {"merged": {"kl": 0.5, "top1": 0.5}, "quantized": {"kl": 0.25, "top1": 0.75}}}
    assert agreement_lines(better) == [
        "to experts  KL 0.5 -> 0.25, same answers 50.0 -> 75.0% (merged -> quantized, on test samples without labels)"
    ]
    worse = {"a": {"merged": {"kl": 0.25}, "quantized": {"kl": 0.5}}}
    assert agreement_lines(worse)[1].strip() == "the quantized model is further from the experts than the merge"
    assert agreement_lines({}) == []
