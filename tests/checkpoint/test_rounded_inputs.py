"""Oracles: closed forms, and transformers' own model of the checkpoint, which compressed-tensors makes round its inputs
if its config does not ask to dequantize."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from epmq_cli.checkpoint.rounded_inputs import input_formats, input_rounding, rounded_inputs
from epmq_cli.commands.eval import evaluate
from epmq_cli.families.family import load_model
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.steps import open_checkpoint
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.names import FIXED
from tests.helpers.hubs import config, eval_config, run_in
from tests.helpers.tiers import first

ROUNDED = {name: format for name, format in FIXED.items() if format.activations != "none" and format.group_size < 64}


def test_int8_and_static_fp8_round_as_in_closed_form() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0, 0.01])[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    wanted = (x / scale).round().clamp(-128, 127) * scale
    rounded = input_rounding(IntFormat(8, -1, "none", "int8"))
    torch.testing.assert_close(rounded(x), wanted)
    torch.testing.assert_close(rounded(x.view(6, 8)), wanted.view(6, 8))  # a scale a token, not one for all
    fixed = input_rounding(Fp8Format(-1, "fp8_static", input_scale=0.5))
    torch.testing.assert_close(fixed(x), (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5)
    assert fixed(x[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize("name", first(2, ["w8a8", "fp8_static", *ROUNDED]))
def test_outputs_are_those_of_transformers_with_rounded_inputs(name: str, bert_hub: Path, tmp_path: Path) -> None:
    format = FIXED[name]
    options = (f"quant.format={name}", f"bits={format.bits}", f"group_size={format.group_size}", "quant=rtn")
    folder = run_in(tmp_path / "run", bert_hub, *options, "eval.stages=[]")
    job = make_job(config(bert_hub, *options))
    tokens = torch.arange(5, 17).view(2, 6)
    own = load_model(job.family, folder, torch.device("cpu"))
    plain = own(tokens).last_hidden_state
    formats = input_formats(folder)
    with rounded_inputs(own, formats):
        found = own(tokens).last_hidden_state
    assert torch.equal(own(tokens).last_hidden_state, plain)
    for kernel in ("dequantize", "exact"):
        for inputs, wanted in ((True, found), (False, plain)):
            evaluation = replace(job.evaluation, kernel=kernel, round_inputs=inputs)
            model = open_checkpoint(job.family, folder, torch.device("cpu"), evaluation)
            torch.testing.assert_close(model(tokens).last_hidden_state, wanted)
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]["dequantize"]
    (folder / "config.json").write_text(json.dumps(described))
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert formats.keys() == {name for name, module in theirs.named_modules() if hasattr(module, "quantization_scheme")}
    theirs.hf_quantizer.compressor.decompress_model(theirs)
    torch.nn.Module.to(theirs, torch.float32)  # MX and NVFP4 become bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(found, theirs(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scores_and_agreement_of_a_run_contain_the_rounding_and_eval_repeats_them(
    bert_hub: Path, tmp_path: Path
) -> None:
    options = ("quant=rtn", "quant.format=mxfp4", "bits=4", "group_size=32")
    found = {}
    for inputs in ("true", "false"):
        folder = run_in(tmp_path / inputs, bert_hub, *options, f"eval.round_inputs={inputs}")
        (tmp_path / f"{inputs}-eval").mkdir()
        evaluate(eval_config(folder, f"eval.round_inputs={inputs}"), tmp_path / f"{inputs}-eval", [])
        run, repeated = (
            json.loads((tmp_path / place / "metrics.json").read_text()) for place in (inputs, f"{inputs}-eval")
        )
        assert repeated["scores"]["tasks"].keys() == {"first", "second"}
        for task, scores in repeated["scores"]["tasks"].items():
            assert scores["quantized"] == run["scores"]["tasks"][task]["quantized"]
        found[inputs] = {task: stages["quantized"]["kl"] for task, stages in run["agreement"].items()}
    assert all(found["true"][task] != kl for task, kl in found["false"].items())
