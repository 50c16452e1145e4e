"""Oracles: the written files, in which all numbers must be finite, and the counts in metrics.json; or the error
message of a run that writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.errors import EpmqError, ModelError
from tests.helpers import edited
from tests.helpers.hubs import run_in
from tests.helpers.tiers import first, only

Change = Callable[[Path], Any]
NAN, INF = float("nan"), float("inf")
FC1, NORM = "layers.0.mlp.fc1.weight", "vision_model.encoder.layers.0.layer_norm1"
HARD: dict[str, tuple[str, Change]] = {
    "all pictures equal": ("clip", lambda hub: edited.edit_pictures(hub, lambda a: {"images": 0 * a["images"] + 9})),
    "all pictures black": ("clip", lambda hub: edited.edit_pictures(hub, lambda a: {"images": 0 * a["images"]})),
    "one picture": ("clip", lambda hub: edited.edit_pictures(hub, lambda a: {n: x[:1] for n, x in a.items()})),
    "all texts equal": ("bert", lambda hub: edited.write_rows(hub, "0\tred\n" * 40)),
    "one text": ("bert", lambda hub: edited.write_rows(hub, "0\tred blue\n")),
    "texts without words": ("bert", lambda hub: edited.write_rows(hub, "0\t\n" * 5)),
    "a block whose inner units are dead": ("bert", lambda hub: edited.scale(hub, "layer.0.intermediate.dense", 0)),
    "a norm that lets nothing pass": ("clip", lambda hub: edited.scale(hub, "layers.0.layer_norm1", 0)),
    "weights that are all 0": ("clip", lambda hub: edited.scale(hub, "layers.0.mlp", 0)),
    "weights of 1e18": ("clip", lambda hub: edited.scale(hub, FC1, 1e18)),
    "weights of 1e-30": ("clip", lambda hub: edited.scale(hub, "layers.0", 1e-30)),
    "weights that are denormal": ("clip", lambda hub: edited.scale(hub, "layers.0.mlp", 1e-42)),
}


@pytest.mark.parametrize("guidance", first(1, ["feature", "merged", "expert"]))
@pytest.mark.parametrize("case", only(("all pictures equal", "all texts equal"), HARD))
def test_hard_cases_finish_with_finite_numbers(
    case: str, guidance: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain quantization has no anchor, so a Hessian of rank 1 needs damping, which is counted and reported."""
    name, change = HARD[case]
    hub = edited.copied(request.getfixturevalue(f"{name}_hub"), tmp_path / "hub")
    change(hub)
    checkpoint = run_in(tmp_path / "run", hub, f"guidance={guidance}", "eval.stages=[quantized]", "eval.samples=4")
    assert edited.all_finite(checkpoint)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    events = metrics["events"]
    assert events["damping_retried"] == sum(layer["damping_retries"] > 0 for layer in metrics["layers"])
    said = f"{events['damping_retried']} needed more damping" in capsys.readouterr().out
    assert said == (events["damping_retried"] > 0)


HOPELESS: dict[str, tuple[str, tuple[str, ...], Change, str]] = {
    "NaN in an expert": (
        "clip", (), lambda hub: edited.put(hub / "first", FC1, NAN),
        f"expert of task first: vision_model.encoder.{FC1} holds a NaN or an infinity; train or fetch the model again",
    ),
    "infinity in an expert, TIES": (
        "clip", ("merge=ties",), lambda hub: edited.put(hub / "second", FC1, -INF),
        f"expert of task second: vision_model.encoder.{FC1} holds a NaN or an infinity",
    ),
    "NaN in the base": (
        "clip", (), lambda hub: edited.put(hub / "base", f"{NORM}.weight", NAN),
        f"base: {NORM}.weight holds a NaN or an infinity; train or fetch the model again",
    ),
    "NaN in what is not merged": (
        "clip", (), lambda hub: edited.put(hub / "base", "logit_scale", NAN),
        "base: logit_scale holds a NaN or an infinity",
    ),
    "infinity in the text tower": (
        "clip", (), lambda hub: edited.put(hub / "base", f"text_model.encoder.{FC1}", INF),
        f"base: text_model.encoder.{FC1} holds a NaN or an infinity",
    ),
    "NaN in a head": (
        "bert", (), lambda hub: edited.put(hub / "first", "classifier.bias", NAN),
        "expert of task first: classifier.bias holds a NaN or an infinity",
    ),
    "weights beyond float16": (
        "clip", ("pack.dtype=float16",), lambda hub: edited.put(hub / "base", f"vision_model.encoder.{FC1}", 1e6),
        f"base: vision_model.encoder.{FC1} does not fit into float16; choose another pack.dtype, such as bfloat16",
    ),
    "a merge beyond float16": (
        "clip", ("pack.dtype=float16", "merge.scale=10"), lambda hub: edited.put(hub / "first", FC1, 6e4),
        f"the merge of vision_model.encoder.{FC1} does not fit into float16; choose another pack.dtype, such as",
    ),
    "activations that overflow": (
        "clip", ("eval.stages=[]",), lambda hub: edited.scale(hub, "layers.0.mlp.fc2.weight", 1e30),
        "the inputs of vision_model.encoder.layers.1.self_attn.q_proj hold NaN or infinity on task first; check",
    ),
    "logits that overflow": (
        "clip", (), lambda hub: edited.scale(hub, "layers.0.mlp.fc2.weight", 1e30),
        "the logits on task first contain NaN or infinity; check the model's weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", only(("NaN in an expert", "weights beyond float16", "activations that overflow"), HOPELESS)
)
def test_hopeless_cases_are_refused_in_one_sentence_without_a_checkpoint(
    case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name, options, change, message = HOPELESS[case]
    hub = edited.copied(request.getfixturevalue(f"{name}_hub"), tmp_path / "hub")
    change(hub)
    with pytest.raises(ModelError) as raised:
        run_in(tmp_path / "run", hub, "eval.samples=4", *options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not {"checkpoint", "metrics.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_weights_that_are_not_finite_are_never_written(
    clip_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last check covers the written weights, whatever the cause of a NaN."""
    from epmq_cli.quantize.formats.format import Grid, QuantizedWeight
    from epmq_cli.quantize.rtn import rtn

    def broken(*options: Any) -> QuantizedWeight:
        found = rtn(*options)
        return replace(found, grid=Grid(found.grid.scale * NAN, None))

    monkeypatch.setattr("epmq_cli.quantize.rtn.rtn", broken)
    with pytest.raises(EpmqError, match=r"NaN or infinity"):
        run_in(tmp_path, clip_hub, "quant=rtn", "eval.stages=[]")
    assert not {"checkpoint", "metrics.json"} & {path.name for path in tmp_path.iterdir()}
