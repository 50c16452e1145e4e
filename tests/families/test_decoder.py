"""Oracles: the expert itself, which a student without quantizer must become, and transformers' own forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, claiming
from epmq_cli.families.decoder import block_steps
from epmq_cli.families.structure import Linears, Norm
from epmq_cli.pipeline import calibration as guide
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.preflight import check_parts
from tests.helpers.architectures import GROUPED, REFUSED, TAKEN, built
from tests.helpers.hubs import config, run_in, walk
from tests.helpers.minihub import decoder_files
from tests.helpers.tiers import only

FAMILY = FAMILIES["causal_lm"]
LONE = ("~suite.tasks.second", "guidance=feature", "guidance.lam=0.0000001", "quant=none", "merge=none")


def distances(folder: Path, *options: str) -> tuple[float, float]:
    """How far base and student are from the lone expert, in the mean square of the features."""
    found = walk(folder, *LONE, "calib.samples=40", *options)
    models, model, _ = steps.open_models(found.job)
    far = found.features(model)
    names = models.source.names
    guide.copy_into(model, {name: models.source.expert("first", name) for name in names})
    wanted = found.features(model)
    return tuple(float((x - wanted).square().mean()) for x in (far, found.features(found.student)))  # type: ignore[return-value]


FAST = ("glm4", "olmo")  # norms on both sides of a part, and behind it alone


@pytest.mark.parametrize("kind", only(FAST, TAKEN))
def test_a_lone_expert_is_met_under_auto(kind: str, tmp_path: Path) -> None:
    """One task, no anchor, no quantizer: the student, started from another model, ends as the expert."""
    hub = decoder_files(tmp_path, built(TAKEN[kind]))
    base, student = distances(hub, "suite.family=auto")
    assert student < 0.05 * base


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_unknown_of_a_decoder_is_refused_by_name(kind: str) -> None:
    """The architectures whose blocks have other parts than the family's steps."""
    build, said = REFUSED[kind]
    with pytest.raises(ModelError, match=f"^base: .*{said}.*family causal_lm takes llama, .*; epmq merge .* merges"):
        check_parts(build(), FAMILY)


def test_parallel_parts_of_a_listed_type_are_refused_before_calibration(tmp_path: Path) -> None:
    """`auto` takes StableLM by its type; whether a block adds its parts in parallel is in its config alone."""
    hub = decoder_files(tmp_path, built(REFUSED["stablelm"][0]))
    with pytest.raises(ModelError, match="no norms that the family knows"):
        steps.open_models(make_job(config(hub, "suite.family=auto")))


def test_glm_4_has_norms_before_and_behind_its_parts() -> None:
    """The order of transformers' own forward pass."""
    found = block_steps(TAKEN["glm4"]().model.layers[0], "a block")
    assert [step.name if isinstance(step, Norm) else step.names[-1].rpartition(".")[2] for step in found] == [
        "input_layernorm",
        "v_proj",
        "o_proj",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "gate_up_proj",
        "down_proj",
        "post_mlp_layernorm",
    ]
    assert all(step.stream is None for step in found if isinstance(step, Linears))


def test_the_drift_of_a_scaled_stream_is_made_up_for(tmp_path: Path) -> None:
    """Granite adds 0.22 of what its linears give: with beta = 1 the student is nearer to the expert than without."""
    hub = decoder_files(tmp_path, built(TAKEN["granite"]))
    scales = {s.scale for s in FAMILY.blocks(TAKEN["granite"]())[0].steps if isinstance(s, Linears) and s.stream}
    assert scales == {0.22}
    (_, with_drift), (_, without) = (distances(hub, f"guidance.beta={beta}", "guidance.alpha=0.5") for beta in (1, 0))
    assert with_drift < without


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4", "olmo", "olmo2", "starcoder2"])
def test_checkpoints_of_these_blocks_reload_with_equal_outputs(kind: str, tmp_path: Path) -> None:
    """The student itself, loaded by plain transformers."""
    hub = decoder_files(tmp_path / "hub", built(TAKEN[kind]))
    options = ["suite.family=auto", "guidance=feature", "bits=4", "eval.samples=4"]
    public = AutoModelForCausalLM.from_pretrained(run_in(tmp_path / "run", hub, *options)).eval()
    student: Any = walk(hub, *options).student
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.inference_mode():
        assert torch.equal(public(ids).logits, student(ids).logits)


def test_an_explicit_family_takes_no_type_of_another_one(tmp_path: Path) -> None:
    """The families' own lists of types."""
    hub = decoder_files(tmp_path, built(TAKEN["arcee"]))
    path = hub / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert"}))
    with pytest.raises(ModelError, match="holds a model of type bert, which family bert takes; set suite.family=bert"):
        steps.open_models(make_job(config(hub)))


def test_a_type_that_no_family_lists_is_taken_where_the_checks_find_nothing(tmp_path: Path) -> None:
    """InternLM 3 is a Llama by another name in transformers: the same steps."""
    import transformers as t

    model = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model("internlm3", **GROUPED))
    assert model.config.model_type == "internlm3"
    hub = decoder_files(tmp_path / "hub", model.eval())
    with pytest.raises(ModelError, match=r"no family takes models of type internlm3.*suite.family=causal_lm tries"):
        claiming(json.loads((hub / "base" / "config.json").read_text()))
    assert (run_in(tmp_path / "run", hub, "eval.stages=[]") / "config.json").is_file()
