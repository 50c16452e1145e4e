"""Oracles: the run without refinement, and the errors of the blocks in metrics.json."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from epmq_cli.errors import ConfigError, DataError
from epmq_cli.pipeline.job import make_job
from epmq_cli.report.metrics_json import schema
from tests.faults.driver import at_file, attempt, files
from tests.helpers.hubs import config, run_in, walk
from tests.helpers.minihub import hub_of
from tests.helpers.tiers import first

PLAIN = ("guidance=feature", "eval.samples=8", "bits=2")
FEW = ("refine=blocks", "refine.iterations=8", "refine.every=4", "refine.batch_size=4")
OPTIONS = (*PLAIN, *FEW)
SMOOTH = (
    "refine.held_out=false",
    "refine.rounding_lr=0",
    *(f"refine.{name}_lr=0.0003" for name in ("scale", "norm", "bias")),
)
"""Exact gradients of all samples, and small steps."""
FIXED = [f"refine.{name}=0" for name in ("rounding_lr", "scale_lr", "norm_lr", "bias_lr")]
KINDS = ("llama", "bert", "clip", "t5", "vit", "roberta", "modernbert", "deberta")


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    jsonschema.validate(found, schema())
    return found


@pytest.mark.parametrize("kind", first(1, KINDS))
def test_the_error_of_no_block_rises_in_every_family(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    hub = hub_of(kind, request, tmp_path / "hub")
    run_in(tmp_path / "refined", hub, *OPTIONS, *SMOOTH)
    run_in(tmp_path / "plain", hub, *PLAIN)
    found, plain = measured(tmp_path / "refined"), measured(tmp_path / "plain")
    job = make_job(config(hub, *OPTIONS))
    from epmq_cli.pipeline import steps

    _, model, _ = steps.open_models(job)
    assert [block["name"] for block in found["blocks"]] == [block.prefix for block in job.family.blocks(model)]
    for block in found["blocks"]:
        assert (block["iteration"] > 0) == (block["error"] < block["error_before"])
        assert block["error"] <= block["error_before"]
    assert any(block["iteration"] for block in found["blocks"])
    assert "blocks" not in plain
    assert found["average_bits"] == plain["average_bits"]


@pytest.mark.parametrize("guidance", first(1, ["feature", "merged", "expert", "asymmetric"]))
def test_nothing_learned_is_the_run_without_refinement(guidance: str, bert_hub: Path, tmp_path: Path) -> None:
    plain = (f"guidance={guidance}", "eval.samples=8", "quant=rtn")
    run_in(tmp_path / "refined", bert_hub, *plain, *FEW, *FIXED)
    run_in(tmp_path / "plain", bert_hub, *plain)
    found, wanted = (
        {name: content for name, content in files(tmp_path / folder).items() if "epmq" not in name}
        for folder in ("refined", "plain")
    )
    assert found.keys() == wanted.keys()
    assert [name for name in found if name.endswith(".safetensors") and found[name] != wanted[name]] == []


@pytest.mark.parametrize(
    "options",
    first(
        1,
        [
            "guidance=merged quant=rtn",
            "guidance=merged",
            "guidance=expert quant=hqq",
            "guidance=asymmetric quant.symmetric=false",
            "guidance=feature bits=2.5",
            "guidance=feature guidance.sweeps=2 quant.act_order=true pack.dtype=bfloat16",
            "guidance=merged calib.student=disk calib.memory=1KB",
            "guidance=feature refine.lam=0.1",
        ],
    ),
)
def test_the_held_out_error_never_rises_with_any_guidance_and_grid(options: str, bert_hub: Path) -> None:
    found = walk(bert_hub, "bits=2", *FEW, *options.split())
    assert len(found.walked.blocks) == 2
    for block in found.walked.blocks:
        assert (block.iteration > 0) == (block.held_out < block.held_out_before)
        assert block.held_out <= block.held_out_before
    for name, weight in found.walked.weights.items():
        assert torch.equal(found.student.get_submodule(name).weight, weight.dequantize())


def test_activations_in_files_change_nothing(clip_hub: Path) -> None:
    whole, spilled = walk(clip_hub, *OPTIONS), walk(clip_hub, *OPTIONS, "calib.memory=1KB")
    assert whole.walked.blocks == spilled.walked.blocks
    for one, other in zip(whole.student.state_dict().values(), spilled.student.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("quant=none",), r"got quant=none, which leaves them dense; use another quant, or refine=distill"),
        (("quant=awq",), r"does not work with quant=awq, which scales input channels; use quant=gptq, rtn or hqq"),
        (("quant.format=fp8", "bits=8"), r"rounds to integers, got quant.format=fp8; use quant.format=int"),
        (("quant.format=[int4,fp8]", "bits=6"), r"got quant.format=fp8"),
        (("refine.iterations=0",), r"refine.iterations must be a whole number in \[1"),
        (("refine.clip=[1]",), r"refine.clip must be a list such as \[0.5, 1.1\], got \[1\]"),
        (("refine.clip=[0,1]",), r"refine.clip\[0\] must be a number in \(0, 1\], got 0"),
        (("refine.rounding_lr=2",), r"refine.rounding_lr must be a number in \[0, 1\], got 2"),
    ],
)
def test_what_it_cannot_refine_is_refused_before_a_model_is_opened(
    options: tuple[str, ...], message: str, bert_hub: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(config(bert_hub, *FEW, *options))


def test_it_needs_samples_to_hold_out(bert_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 4 calibration samples, but refine=blocks needs 5"):
        run_in(tmp_path / "few", bert_hub, *OPTIONS, "calib.samples=4")


def test_a_run_that_was_killed_behind_a_block_continues_to_the_same_bytes(bert_hub: Path, tmp_path: Path) -> None:
    """Also see tests/faults/test_killed.py, which kills at other places."""
    run_in(tmp_path / "whole", bert_hub, *OPTIONS)
    run, blocks = tmp_path / "run", 0
    for number in range(12, 60, 6):
        assert attempt(run, bert_hub, *OPTIONS, hook=at_file(number, run)) == -signal.SIGKILL
        blocks = len(list(run.glob(".resume/*/last/0000.safetensors")))
        if blocks:
            break
    assert blocks == 1
    assert attempt(run, bert_hub, *OPTIONS) == 0
    assert files(run) == files(tmp_path / "whole")
    assert measured(run)["blocks"] == measured(tmp_path / "whole")["blocks"]
