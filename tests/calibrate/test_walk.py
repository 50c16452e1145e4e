"""Oracles: the same calculation from the hidden states of transformers, and invariants of the walk as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.reference_weights import ReferenceWeights
from epmq_cli.errors import ModelError
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import Walk, config, walk
from tests.helpers.tiers import first

STEPS = 4  # number of linears in a block
LAYERS = {"clip": "vision_model.encoder.layers", "bert": "encoder.layer"}


def hub_of(name: str, request: pytest.FixtureRequest) -> Path:
    hub: Path = request.getfixturevalue(f"{name}_hub")
    return hub


def dequantized(found: Walk) -> dict[str, Tensor]:
    return {name: weight.dequantize() for name, weight in found.walked.weights.items()}


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_every_linear_of_every_block_is_walked_once_in_order(name: str, request: pytest.FixtureRequest) -> None:
    found = walk(hub_of(name, request))
    assert next(iter(found.walked.weights)).startswith(f"{LAYERS[name]}.0.")
    linears = [
        block.name(child)
        for block in found.job.family.blocks(found.student)
        for child, module in block.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(found.walked.weights) == sorted(linears)
    assert [record.name for record in found.walked.records] == list(found.walked.weights)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_student_ends_with_the_quantized_weights(name: str, request: pytest.FixtureRequest) -> None:
    found = walk(hub_of(name, request), "bits=3")
    for module, weight in dequantized(found).items():
        assert torch.equal(found.student.get_submodule(module).weight, weight)


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_experts_equal_to_the_merge_give_plain_gptq_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    hub = hub_of(name, request)
    same = [f"suite.tasks.{task}.expert={hub / 'first'}" for task in ("first", "second")]
    options = [*same, "merge=average", "guidance.lam=0", "bits=3"]
    guided, plain = walk(hub, "guidance=expert", *options), walk(hub, "guidance=merged", *options)
    for module, weight in dequantized(guided).items():
        assert torch.equal(weight, dequantized(plain)[module])
    assert max(record.loss_merged for record in guided.walked.records) == 0


def test_first_group_without_quantizer_and_anchor_is_regmean_of_the_hidden_states(clip_hub: Path) -> None:
    found = walk(clip_hub, "quant=none", "guidance.lam=0")
    job = make_job(config(clip_hub))
    models, model, dtype = steps.open_models(job)
    merged = LazyMerge(models.source, job.merge, dtype)
    copy_into(model, merged)
    tower, target = model.vision_model, "encoder.layers.0.self_attn.q_proj"
    rows, outputs = [], []
    for task, batches in found.batches.items():
        with torch.inference_mode():
            hidden = torch.cat([tower(**batch, output_hidden_states=True).hidden_states[0] for batch in batches])
            inputs = tower.encoder.layers[0].layer_norm1(hidden).flatten(0, 1).double()
        scale = torch.linalg.norm(inputs.T @ inputs) ** -0.5
        rows.append(scale * inputs)
        outputs.append(scale * inputs @ models.source.expert(task, f"vision_model.{target}.weight").double().T)
    direct = torch.linalg.lstsq(torch.cat(rows), torch.cat(outputs)).solution.T
    torch.testing.assert_close(dequantized(found)[f"vision_model.{target}"].double(), direct, rtol=1e-3, atol=1e-4)


def test_inputs_come_through_the_quantized_prefix(clip_hub: Path) -> None:
    coarse, fine = walk(clip_hub, "bits=2"), walk(clip_hub, "quant=none")
    first = [found.walked.records[0] for found in (coarse, fine)]
    assert first[0].loss_target == first[1].loss_target  # nothing is quantized before the first group
    assert coarse.walked.records[-1].loss_target != fine.walked.records[-1].loss_target


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_guidance_lowers_the_objective_below_that_of_the_merge(name: str, request: pytest.FixtureRequest) -> None:
    for record in walk(hub_of(name, request), "bits=8").walked.records:
        assert record.loss_target < record.loss < record.loss_merged
        assert record.condition is not None
        assert record.condition >= 1


def test_padding_changes_nothing(bert_hub: Path) -> None:
    options = ["quant=none", "guidance.lam=0.05"]
    alone = walk(bert_hub, *options, "calib.batch_size=1")
    padded = walk(bert_hub, *options, "calib.batch_size=24")
    assert alone.walked.records[0].tokens == padded.walked.records[0].tokens
    assert any((batch["attention_mask"] == 0).any() for batch in padded.batches["first"])
    for module, weight in dequantized(alone).items():
        torch.testing.assert_close(weight, dequantized(padded)[module], rtol=1e-4, atol=1e-5)


def test_padding_tokens_are_not_counted(bert_hub: Path) -> None:
    found = walk(bert_hub)
    real = sum(int(batch["attention_mask"].sum()) for group in found.batches.values() for batch in group)
    assert {record.tokens for record in found.walked.records} == {real}


def test_group_size_that_does_not_divide_a_linear_is_refused_by_name(clip_hub: Path) -> None:
    with pytest.raises(Exception, match=r"group_size=24 must divide the 32 inputs of vision_model.encoder.layers.0"):
        walk(clip_hub, "group_size=24")


def test_activations_that_are_not_finite_are_refused(clip_hub: Path) -> None:
    job = make_job(config(clip_hub))
    models, model, dtype = steps.open_models(job)
    batches = steps.calibration_batches(job, models.base.path)
    batches["second"][0]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"the inputs of vision_model.encoder.layers.0.self_attn.q_proj hold NaN"):
        guide.calibrate(RunContext.of(job), model, batches, [], LazyMerge(models.source, job.merge, dtype))


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_activations_in_files_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    """Equals the same walk with all activations in memory, bit for bit."""
    hub = request.getfixturevalue(f"{name}_hub")
    inside, outside = (walk(hub, "guidance=feature", f"calib.memory={size}") for size in ("1GB", "1KB"))
    for one, other in zip(inside.student.state_dict().values(), outside.student.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_experts_block_is_read_once_if_it_fits_in_memory(clip_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, str]] = []
    real = ReferenceWeights.expert

    def expert(self: ReferenceWeights, task: str, name: str) -> Tensor:
        read.append((task, name))
        return real(self, task, name)

    monkeypatch.setattr(ReferenceWeights, "expert", expert)
    norm = ("first", f"{LAYERS['clip']}.0.layer_norm1.weight")
    for memory, often in (("1GB", 1), ("1KB", STEPS + 1)):  # once per step, and once to finish the block
        read.clear()
        walk(clip_hub, "guidance=feature", "guidance.norms=false", f"calib.memory={memory}")
        assert read.count(norm) == often
