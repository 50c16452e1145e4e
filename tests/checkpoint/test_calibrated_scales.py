"""Oracles: closed forms of scales, the names that vLLM maps to its attention, and the same weights without scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from epmq_cli.checkpoint.calibrated_scales import cache_scales, expected_cache
from epmq_cli.checkpoint.load import load
from epmq_cli.commands.verify import verify
from epmq_cli.errors import ConfigError
from epmq_cli.models.attention import cached_attentions, recorded
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import config, run_in
from tests.helpers.minihub import build


def test_the_largest_number_gets_the_largest_code() -> None:
    found = cache_scales({"a.self_attn": (896.0, 0.0)})
    assert found == {"a.self_attn.k_scale": 2.0, "a.self_attn.v_scale": 1.0}


def test_a_checkpoint_with_scales_of_the_cache_is_that_without_and_loads(tmp_path: Path) -> None:
    hub, options = build(tmp_path / "hub", "llama"), ("quant=rtn", "group_size=32", "calib.samples=8", "eval.stages=[]")
    plain, cached = (
        run_in(tmp_path / name, hub, *options, *more) for name, more in (("a", ()), ("b", ("quant.kv_cache=fp8",)))
    )
    verify(cached, False, "cpu", None)
    without, files = SafetensorsFiles(plain, "checkpoint"), SafetensorsFiles(cached, "checkpoint")
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"]
    assert {*files.infos} == {*without.infos, *names}
    assert all(torch.equal(files.tensor(name), without.tensor(name)) for name in without.infos)
    quantization = json.loads((cached / "config.json").read_text())["quantization_config"]
    assert quantization["dequantize"] is True
    assert quantization["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False
    }  # fmt: skip
    tokens = torch.arange(5, 13)[None]
    model, other = AutoModelForCausalLM.from_pretrained(cached).eval(), load(plain, "cpu", "dequantize")
    with torch.inference_mode():
        own = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(own, other.generate(tokens, max_new_tokens=4, do_sample=False))  # type: ignore[operator]
        with recorded(model, cached_attentions(model)) as recorders:
            model(tokens, use_cache=False)
    seen = [largest for recorder in recorders.values() for largest in recorder.seen or ()]
    scales = [float(files.tensor(name)) * 448 for name in names]
    assert all(0.2 < scale / largest < 5 for scale, largest in zip(scales, seen, strict=True))
    assert load(cached, "cpu", "dequantize").state_dict().keys() == other.state_dict().keys()
    check = expected_cache(cached, model)[names[0]].check
    assert check(files.tensor(names[0])) is None
    assert check(torch.zeros(1)) == "holds scales that are not above 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("pack=dense",), "pack=dense stores no scales of cached keys and values, got quant.kv_cache=fp8; use"),
        (("pack=gptq",), "pack=gptq stores no scales of cached keys and values, got quant.kv_cache=fp8; use"),
        (("bits=3.5",), "quant.kv_cache=fp8 takes one number format, .*, got int3 and int4; use quant.kv_cache=null"),
        (("quant.kv_cache=int8",), "quant.kv_cache must be one of null, fp8, got 'int8'"),
    ],
)
def test_what_cannot_hold_the_scales_is_refused_first(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    hub = build(tmp_path / "hub", "llama")
    with pytest.raises(ConfigError, match=message):
        make_job(config(hub, "quant.kv_cache=fp8", *options, "suite.base=nowhere"))


def test_encoders_are_refused_first(bert_hub: Path) -> None:
    with pytest.raises(ConfigError, match="quant.kv_cache=fp8 is for decoders, got models of family bert; use"):
        make_job(config(bert_hub, "quant.kv_cache=fp8", "suite.base=nowhere"))
