"""Oracles: transformers' own models of the experts, sample by sample: gradients from one backward pass per class,
and inputs of linears from hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn.functional import normalize

from epmq_cli.calibrate.merge_data import ExpertMeasurements, expected_squares
from epmq_cli.data.batching import Batch, split
from epmq_cli.data.held_out import Subset
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config
from tests.helpers.minihub import build, hub_of
from tests.helpers.tiers import only

TASK = "first"
FEW = ("calib.samples=10", "calib.batch_size=4")


def measurements(hub: Path, *overrides: str) -> ExpertMeasurements:
    """The measurements of a run with `merge=regmean`, or another method that needs data."""
    job = make_job(config(hub, "merge=regmean", *FEW, *overrides))
    models, model, _ = steps.open_models(job)
    tasks = steps.prepare_tasks(job, model, models)
    context, drawn = RunContext.of(job), steps.calibration_batches(job, models.base.path)
    batches = guide.run_teachers(context, model, models.source, drawn).batches
    found = steps.merge_data(context, model, models.source, batches, tasks)
    assert found is not None
    return found


def samples(data: ExpertMeasurements) -> list[Batch]:
    return [sample for batch in data.batches[TASK] for sample in split(batch, 1)]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal up to rounding relative to the largest value of a tensor, or of all tensors: the gradients of key biases
    are pure rounding error, because softmax ignores these biases."""
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = float(tensor.abs().max()) + 1e-6 * largest
        assert float((found[name] - tensor).abs().max()) < 1e-3 * scale, name


def reference(model: nn.Module, logits: Any, batches: list[Batch], classes: int | None = None) -> dict[str, Tensor]:
    """E over samples, sum over classes of p (d log p)^2, with one backward pass per class."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        chances = logits(batch).softmax(-1).flatten().detach()
        for c in chances.argsort(descending=True)[:classes].tolist():
            model.zero_grad()
            logits(batch).log_softmax(-1).flatten()[c].backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += float(chances[c]) * parameter.grad.square() / len(batches)
    return sums


@pytest.mark.parametrize("classes", [None, 2])
def test_squared_gradients_of_a_classifier_with_padding(classes: int | None, bert_hub: Path) -> None:
    data = measurements(bert_hub)
    found = data.squared_gradients(TASK, classes)
    expert = t.BertForSequenceClassification.from_pretrained(bert_hub / TASK).eval()
    wanted = reference(expert, lambda batch: expert(**batch).logits, samples(data), classes)
    same(found, {name: wanted[f"bert.{name}"] for name in found})
    assert any(name.startswith("embeddings.") for name in found)


def test_squared_gradients_of_clip(clip_hub: Path) -> None:
    data = measurements(clip_hub)
    found = data.squared_gradients(TASK, None)
    model = t.CLIPModel.from_pretrained(clip_hub / "base").eval()
    model.vision_model.load_state_dict(t.CLIPVisionModel.from_pretrained(clip_hub / TASK).state_dict())
    head = data.heads[TASK]["weight"].clone()

    def logits(batch: Batch) -> Tensor:
        features = model.visual_projection(model.vision_model(**batch).pooler_output)
        return 100 * normalize(features, dim=-1) @ head.T

    wanted = reference(model, logits, samples(data))
    same(found, {name: wanted[name] for name in found})
    assert "vision_model.embeddings.class_embedding" in found


def test_gradients_of_a_mean_loss_are_those_of_the_whole_batch(bert_hub: Path) -> None:
    data = measurements(bert_hub)
    batch = data.batches[TASK][0]
    targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expert = t.BertForSequenceClassification.from_pretrained(bert_hub / TASK).eval()
    (expert(**batch).logits - targets).square().sum(-1).mean().backward()
    wanted = {name: parameter.grad for name, parameter in expert.bert.named_parameters() if parameter.grad is not None}
    data.put(data.source.model(TASK))
    for samples in (4, 1):
        data.micro.samples = samples
        same(data.gradients(TASK, batch, lambda logits, rows: (logits - targets[rows]).square().sum(-1)), wanted)
    assert not any(parameter.requires_grad for parameter in data.model.parameters())


def test_class_gradients_add_up_for_any_number_of_classes_per_pass() -> None:
    W = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x, b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.zeros(5, dtype=torch.float64, requires_grad=True)
    p = (W @ x).softmax(-1).detach()
    delta = torch.eye(5) - p  # (class, logit): d log p_c / d logits
    wanted = {"W": torch.einsum("c,ci,j->ij", p, delta.square(), x.square()), "b": p @ delta.square()}
    for together in (1, 2, 5):
        found = expected_squares(lambda: W @ x + b, {"W": W, "b": b, "unused": x.requires_grad_()}, None, together)
        torch.testing.assert_close(found["W"], wanted["W"])
        torch.testing.assert_close(found["b"], wanted["b"])


def test_a_head_with_one_output_is_the_mean_of_a_gaussian() -> None:
    w = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = expected_squares(lambda: w @ torch.tensor([3.0, -1.0]), {"w": w}, None, 8)
    assert found["w"].tolist() == [[9.0, 1.0]]


def test_the_model_requires_no_gradients_afterwards(bert_hub: Path) -> None:
    data = measurements(bert_hub)
    data.squared_gradients(TASK, None)
    assert not any(parameter.requires_grad for parameter in data.model.parameters())


def moments_by_hooks(
    model: nn.Module, names: list[str], call: Any, rows: Any, data: ExpertMeasurements
) -> dict[str, Tensor]:
    """The mean of x x' by linear, over the inputs of first calls. `rows`: the rows of an input that are not padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in data.batches[TASK]:
        caught: dict[str, Tensor] = {}

        def keep(name: str, args: tuple[Tensor], caught: dict[str, Tensor] = caught) -> None:
            caught.setdefault(name, args[0])

        hooks = {name: lambda _, args, name=name, keep=keep: keep(name, args) for name in names}
        handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
        with torch.no_grad():
            call(batch)
        for name, tensor in caught.items():
            seen[name].append(rows(name, tensor, batch))
        for handle in handles:
            handle.remove()
    joined = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: X.T @ X / len(X) for name, X in joined.items()}


def test_input_moments_leave_padding_out(bert_hub: Path) -> None:
    data = measurements(bert_hub)
    groups = data.linear_groups()
    assert groups[0] == tuple(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value"))
    names = [group[0] for group in groups]
    expert = t.BertForSequenceClassification.from_pretrained(bert_hub / TASK).eval().bert

    def rows(name: str, x: Tensor, batch: Batch) -> Tensor:
        return x if name == "pooler.dense" else x[batch["attention_mask"].bool()]

    wanted = moments_by_hooks(expert, names, lambda batch: expert(**batch), rows, data)
    same(data.input_moments(TASK, names), wanted)
    assert data.input_moments(TASK, names[:1]).keys() == set(names[:1])


def test_input_moments_of_cross_attention_are_over_the_encoders_tokens(tmp_path: Path) -> None:
    data = measurements(build(tmp_path / "hub", "t5"))
    names = [group[0] for group in data.linear_groups()]
    expert = t.T5ForConditionalGeneration.from_pretrained(tmp_path / "hub" / TASK).eval()

    def rows(name: str, x: Tensor, batch: Batch) -> Tensor:
        encoder = name.startswith("encoder.") or name.endswith("EncDecAttention.k")
        return x[batch["attention_mask" if encoder else "decoder_attention_mask"].bool()]

    wanted = moments_by_hooks(expert, names, lambda batch: expert(**batch), rows, data)
    same(data.input_moments(TASK, names), wanted)


@pytest.mark.parametrize("subset", get_args(Subset))
def test_smaller_micro_batches_give_the_same_bytes(subset: Subset, bert_hub: Path) -> None:
    data = measurements(bert_hub)
    names = [group[0] for group in data.linear_groups()]
    found = data.input_moments(TASK, names, subset)
    data.micro.samples = 1
    again = data.input_moments(TASK, names, subset)
    assert all(torch.equal(found[name], again[name]) for name in names)


@pytest.mark.parametrize("kind", only(("bert",), ["clip", "bert", "deberta", "t5", "llama"]))
def test_every_fifth_sample_is_held_out_of_the_moments(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Oracle: the moments of these samples alone, as batches of their own."""
    data = measurements(hub_of(kind, request, tmp_path / "hub"))
    names = [group[0] for group in data.linear_groups()]
    parts = {subset: data.input_moments(TASK, names, subset) for subset in get_args(Subset)}
    same({name: parts["fitted"][name] + parts["held"][name] for name in names}, parts["all"])
    every = samples(data)
    held = replace(data, batches={TASK: every[4::5]}).input_moments(TASK, names)
    others = replace(data, batches={TASK: [s for n, s in enumerate(every) if n % 5 < 4]}).input_moments(TASK, names)
    for found, wanted in ((parts["held"], held), (parts["fitted"], others)):
        share = {name: found[name].trace() / wanted[name].trace() for name in names}  # of the tokens
        same(found, {name: share[name] * wanted[name] for name in names})


def test_an_expert_stays_in_the_model_until_the_next_one(clip_hub: Path) -> None:
    data = measurements(clip_hub)
    name = data.source.names[0]
    for task in data.batches:
        assert torch.equal(data.expert(task).state_dict()[name], data.source.expert(task, name))
    batch = data.batches[TASK][0]
    with torch.inference_mode():
        assert data.logits(TASK, batch).shape == (4, 3)
