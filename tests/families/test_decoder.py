"""Oracles: the expert itself, which a student without a quantizer must reproduce, and the forward pass of
transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, claiming
from epmq_cli.families.decoder import block_steps
from epmq_cli.families.structure import Linears, Norm
from epmq_cli.models.mixtures import MIXTURES
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from epmq_cli.pipeline.preflight import check_parts
from tests.helpers.architectures import FALCON, GROUPED, REFUSED, TAKEN, built
from tests.helpers.hubs import config, lone_expert, run_in, walk
from tests.helpers.minihub import decoder_files
from tests.helpers.tiers import only

FAMILY = FAMILIES["causal_lm"]


def distances(folder: Path, *options: str) -> tuple[float, float]:
    """The mean squared distances of the base's and the student's features from those of the lone expert."""
    far, found, wanted = lone_expert(folder, "calib.samples=40", *options)
    return float((far - wanted).square().mean()), float((found - wanted).square().mean())


FAST = ("glm4", "olmo", "gpt_neox")  # norms on both sides of a part, and only after it; parallel parts


@pytest.mark.parametrize("kind", only(FAST, [kind for kind in TAKEN if kind not in MIXTURES]))
def test_a_lone_expert_is_reproduced_with_family_auto(kind: str, tmp_path: Path) -> None:
    """One task, no anchor, no quantizer: the student starts from another model and ends as the expert. Mixtures of
    experts keep the merged routers, see tests/calibrate/test_mixtures.py."""
    hub = decoder_files(tmp_path, built(TAKEN[kind]))
    base, student = distances(hub, "suite.family=auto")
    assert student < 0.05 * base


@pytest.mark.parametrize("kind", REFUSED)
def test_unknown_parts_of_a_decoder_are_refused_by_name(kind: str) -> None:
    """The architectures whose blocks have parts that the family's steps do not describe."""
    build, said = REFUSED[kind]
    with pytest.raises(ModelError, match=f"^base: .*{said}.*family causal_lm takes llama, .*; epmq merge .* merges"):
        check_parts(build(), FAMILY)


def test_parallel_parts_read_one_stream_and_attention_corrects_its_drift() -> None:
    """Oracle: the configs. GPT-NeoX has the same modules with and without parallel parts."""
    for kind, parallel in (("gpt_neox", True), ("gpt_neox-sequential", False), ("cohere", True), ("stablelm", False)):
        block = FAMILY.blocks(TAKEN[kind]())[0]
        writing = [step for step in block.steps if isinstance(step, Linears) and len(step.names) == 1][-3:]
        corrects = [
            step.stream for step in writing if step.names[0].endswith(("dense", "o_proj", "4h_to_h", "down_proj"))
        ]
        assert corrects == ["input_layernorm", None if parallel else "post_attention_layernorm"], kind


def test_a_block_with_other_paths_is_refused(tmp_path: Path) -> None:
    """BLOOM may add the output of a norm in place of the stream; the names of the modules are the same."""
    options = {"apply_residual_connection_post_layernorm": True}
    hub = decoder_files(tmp_path, built(lambda: BloomForCausalLM(BloomConfig(**FALCON, **options))))
    with pytest.raises(ModelError, match="self_attention.dense is not added to the input of"):
        run_in(tmp_path / "run", hub, "suite.family=auto", "eval.stages=[]")


def test_glm_4_has_norms_before_and_after_its_parts() -> None:
    """Oracle: the order of the forward pass in transformers."""
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


def test_the_drift_of_a_scaled_stream_is_compensated(tmp_path: Path) -> None:
    """Granite scales the outputs of its linears by 0.22: with beta = 1 the student is closer to the expert than
    without."""
    hub = decoder_files(tmp_path, built(TAKEN["granite"]))
    scales = {s.scale for s in FAMILY.blocks(TAKEN["granite"]())[0].steps if isinstance(s, Linears) and s.stream}
    assert scales == {0.22}
    (_, with_drift), (_, without) = (distances(hub, f"guidance.beta={beta}", "guidance.alpha=0.5") for beta in (1, 0))
    assert with_drift < without


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAKEN)
def test_checkpoints_of_these_blocks_reload_with_equal_outputs(kind: str, tmp_path: Path) -> None:
    """Oracle: the student itself; plain transformers loads the checkpoint."""
    hub = decoder_files(tmp_path / "hub", built(TAKEN[kind]))
    options = ["suite.family=auto", "guidance=feature", "bits=4", "eval.samples=4"]
    options += ["pack=dense"] if kind == "gpt2" else []
    public = AutoModelForCausalLM.from_pretrained(run_in(tmp_path / "run", hub, *options)).eval()
    student: Any = walk(hub, *options).student
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.inference_mode():
        rounding = 1e-6 if kind in (*MIXTURES, "gpt2") else 0.0  # transformers multiplies in another order
        torch.testing.assert_close(public(ids).logits, student(ids).logits, rtol=0, atol=rounding)


def test_an_explicit_family_refuses_types_of_other_families(tmp_path: Path) -> None:
    """Oracle: the lists of types of the families."""
    hub = decoder_files(tmp_path, built(TAKEN["arcee"]))
    path = hub / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bert"}))
    with pytest.raises(ModelError, match="holds a model of type bert, which family bert takes; set suite.family=bert"):
        steps.open_models(make_job(config(hub)))


def test_an_unlisted_type_is_accepted_if_the_checks_pass(tmp_path: Path) -> None:
    """InternLM 3 has the steps of Llama under another name in transformers."""
    import transformers as t

    model = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model("internlm3", **GROUPED))
    assert model.config.model_type == "internlm3"
    hub = decoder_files(tmp_path / "hub", model.eval())
    with pytest.raises(ModelError, match=r"no family takes models of type internlm3.*suite.family=causal_lm tries"):
        claiming(json.loads((hub / "base" / "config.json").read_text()))
    assert (run_in(tmp_path / "run", hub, "eval.stages=[]") / "config.json").is_file()
