"""Oracles: walks of the rounding method alone, of plain quantization, and a lone expert that the student must
reproduce."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rtn import rtn
from tests.helpers.hubs import Walk, walk
from tests.helpers.tiers import first


def weights(found: Walk) -> dict[str, Tensor]:
    return {name: weight.dequantize() for name, weight in found.walked.weights.items()}


def same(one: Walk, other: Walk) -> bool:
    pairs = zip(one.student.state_dict().values(), other.student.state_dict().values(), strict=True)
    return all(torch.equal(mine, others) for mine, others in pairs)


@pytest.mark.parametrize("rounding", first(1, ["gptq", "rtn"]))
def test_alpha_0_is_plain_rounding(rounding: str, clip_hub: Path) -> None:
    grid = {"rtn": "mse", "gptq": "hessian"}[rounding]
    options = (
        "quant=awq",
        f"quant.rounding={rounding}",
        f"quant.grid={grid}",
        "quant.candidates=1",
        "quant.clip=false",
    )
    plain = {"rtn": ("quant=rtn",), "gptq": ("quant=gptq", "quant.act_order=false")}[rounding]
    assert same(walk(clip_hub, *options), walk(clip_hub, *plain))


def test_producers_and_readers_are_scaled(clip_hub: Path) -> None:
    plain, folded = (walk(clip_hub, "guidance=merged", *options) for options in (["quant=none"], ["quant=awq"]))
    norm = "vision_model.encoder.layers.0.layer_norm2"
    one, other = (found.student.get_submodule(norm).weight for found in (plain, folded))
    assert not torch.equal(one, other)
    scales = one / other
    torch.testing.assert_close(plain.student.get_submodule(norm).bias / scales, folded.student.get_submodule(norm).bias)
    torch.testing.assert_close(folded.features(folded.student), plain.features(plain.student), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_experts_equal_to_the_merge_give_plain_awq_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    hub = request.getfixturevalue(f"{name}_hub")
    same_expert = [f"suite.tasks.{task}.expert={hub / 'first'}" for task in ("first", "second")]
    options = [*same_expert, "merge=average", "guidance.lam=0", "bits=3", "quant=awq", "quant.alpha=0.5"]
    guided, plain = walk(hub, "guidance=expert", *options), walk(hub, "guidance=merged", *options)
    for module, weight in weights(guided).items():
        assert torch.equal(weight, weights(plain)[module])


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_a_lone_expert_is_reproduced_through_a_fold(name: str, request: pytest.FixtureRequest) -> None:
    """Feature guidance with scaled channels: base, experts, activations and norms are scaled alike."""
    options = ["~suite.tasks.second", "guidance=feature", "guidance.lam=0.0000001", "guidance.readout_weight=1"]
    options += ["quant=awq", "quant.alpha=0.5", "bits=8", "merge=none", "calib.samples=40"]
    found = walk(request.getfixturevalue(f"{name}_hub"), *options)
    models, model, _ = steps.open_models(found.job)
    far = found.features(model)
    guide.copy_into(model, {name: models.source.expert("first", name) for name in models.source.names})
    wanted = found.features(model)
    error = (found.features(found.student) - wanted).square().sum() / (far - wanted).square().sum()
    assert error < 0.05


@pytest.mark.parametrize("quant", first(1, ["rtn", "hqq"]))
def test_no_forward_pass_runs_if_no_inputs_are_needed(
    quant: str, clip_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the model was called")

    job = walk(clip_hub, "guidance=merged", "quant=none").job
    monkeypatch.setattr(job.family, "features", called)
    monkeypatch.setattr(job.family, "complete", called)
    found = walk(clip_hub, "guidance=merged", f"quant={quant}", "merge=none")
    assert {record.tokens for record in found.walked.records} == {0}
    assert {record.loss for record in found.walked.records} == {None}
    if quant == "rtn":
        base = steps.open_models(found.job)[1]
        for name, weight in weights(found).items():
            own = base.get_parameter(f"{name}.weight")
            wanted = rtn(own, IntFormat(4, found.walked.weights[name].format.group_size, "none"), "mse", torch.float32)  # type: ignore[union-attr]
            assert torch.equal(weight, wanted.dequantize())
