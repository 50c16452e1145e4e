"""Oracles: models in which one block differs from its steps, which the check must name; and transformers' models of
all families, which pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from epmq_cli.calibrate import self_check
from epmq_cli.calibrate.self_check import check_blocks
from epmq_cli.errors import ModelError
from epmq_cli.families.causal_lm import CAUSAL_LM
from epmq_cli.families.clip import CLIP
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Norm, Section
from epmq_cli.models.linears import in_linears
from tests.helpers.architectures import GROUPED, TAKEN, built
from tests.helpers.hubs import Scene, run_in
from tests.helpers.minihub import KINDS, build, decoder_files
from tests.helpers.tiers import only

IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 9, 8, 4, 6, 5]])
Blocks = Callable[[Any], list[Section]]


def llama() -> Any:
    return built(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)))


def check(model: Any, family: Family | None = None) -> None:
    check_blocks(model, family or CAUSAL_LM, {"first": [{"input_ids": IDS}]})


def with_steps(change: Callable[[tuple[Linears | Norm, ...]], tuple[Linears | Norm, ...]]) -> Family:
    """A family with changed steps."""

    return with_blocks(CAUSAL_LM, lambda blocks: [replace(block, steps=change(block.steps)) for block in blocks])


def with_blocks(family: Family, change: Callable[[list[Section]], list[Section]]) -> Family:
    """A family with changed blocks."""
    changed = Family(family.architecture, family.tasks)
    changed.stacks = lambda model: [  # type: ignore[method-assign, assignment]
        replace(stack, blocks=change(stack.blocks)) for stack in family.stacks(model)
    ]
    return changed


def with_step(number: int, **changes: Any) -> Family:
    return with_steps(lambda steps: (*steps[:number], replace(steps[number], **changes), *steps[number + 1 :]))


@pytest.mark.parametrize("kind", only(("roberta", "t5"), KINDS))
def test_every_family_passes_without_a_random_number(kind: str, tmp_path: Path) -> None:
    """transformers' own models; the state of torch's generator stays unchanged."""
    scene, state = Scene(build(tmp_path, kind)), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in scene.model.state_dict().items()}
    check_blocks(scene.model, scene.family, {"first": scene.batches})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in scene.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scene.model.modules())
    assert not any("forward" in vars(module) for module in scene.model.modules())


@pytest.mark.parametrize("name", ["bert_hub", "clip_hub"])
def test_bert_and_clip_pass(name: str, request: pytest.FixtureRequest) -> None:
    scene = Scene(request.getfixturevalue(name))
    check_blocks(scene.model, scene.family, {"first": scene.batches})


@pytest.mark.parametrize("kind", TAKEN)
def test_every_decoder_that_auto_accepts_passes(kind: str) -> None:
    check(in_linears(built(TAKEN[kind])))


CLAIMS: dict[str, tuple[Family, str]] = {
    "a norm behind a linear": (with_step(2, stream=None), "layernorm does not read the output of .*o_proj"),
    "a stream that is another one": (with_step(2, stream="self_attn.q_proj"), "o_proj is not added to the input of"),
    "a factor that is none": (with_step(2, scale=0.5), "o_proj is not added to the input of .*input_layernorm"),
    "another order": (with_steps(lambda steps: (steps[3], *steps[:3], *steps[4:])), "layernorm is called after"),
    "linears of two inputs": (
        with_steps(lambda steps: (*steps[:4], Linears(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")))),
        "down_proj does not have the same input as .*gate_proj",
    ),
    "a norm left out": (with_steps(lambda steps: (*steps[:3], *steps[4:])), "o_proj is not added to the input of"),
    "a module that is not there": (with_step(2, names=("self_attn.out",)), "cannot follow the blocks"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_steps_that_differ_from_llama_are_named(claim: str) -> None:
    """Llama itself, with one wrong claim about it."""
    family, said = CLAIMS[claim]
    with pytest.raises(ModelError, match=f"^base: the self-check .*{said}.*; epmq merge "):
        check(llama(), family)


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replaces the forward pass of a module; the new one receives the old one as its argument."""
    real = module.forward
    module.forward = lambda *args, **options: forward(real, *args, **options)


def of_block(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda model: [change(layer) for layer in model.model.layers] and None


def parallel(layer: Any) -> None:
    def forward(hidden: Tensor, **options: Any) -> Tensor:
        normed = layer.input_layernorm(hidden)
        attended, _ = layer.self_attn(hidden_states=normed, **options)
        given: Tensor = hidden + attended + layer.mlp(layer.post_attention_layernorm(hidden))
        return given

    layer.forward = forward


def between(model: Any) -> None:
    """The second block reads more than the output of the first."""
    layers, first = model.model.layers, []
    layers[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    layers[1].register_forward_pre_hook(lambda _, args: (args[0] + first[-1], *args[1:]))


def behind(model: Any) -> None:
    """The model changes the output of its last norm."""

    def forward(real: Callable[..., Any], **options: Any) -> Any:
        output = real(**options)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    with_forward(model.model, forward)


CHANGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "scaled residual": (
        of_block(lambda layer: with_forward(layer.mlp, lambda real, x: 0.9 * real(x))),
        "down_proj is not added to the input of .*post_attention_layernorm",
    ),
    "parallel residual": (of_block(parallel), "o_proj is not added to the input of .*input_layernorm"),
    "a linear that clamps": (
        of_block(lambda layer: with_forward(layer.mlp.up_proj, lambda real, x: real(x).clamp(-0.1, 0.1))),
        "up_proj does not compute W x . b",
    ),
    "a norm whose gain is squared": (
        of_block(
            lambda layer: with_forward(layer.input_layernorm, lambda real, x: real(x) * layer.input_layernorm.weight)
        ),
        "input_layernorm does not compute a gain times its normalized input",
    ),
    "a linear that is called twice": (
        of_block(lambda layer: with_forward(layer.mlp, lambda real, x: 0.5 * (real(x) + real(x)))),
        "gate_proj is called 2 times, not once",
    ),
    "something behind the last norm": (behind, "does not read its last block only through model.norm"),
    "a skip between blocks": (between, "the model changes the hidden state in front of model.layers.1"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_blocks_that_differ_from_llama_are_named(change: str) -> None:
    """Llama with one part that computes something else without new tensors, so its files do not show it."""
    model, (apply, said) = llama(), CHANGED[change]
    check(model)
    apply(model)
    with pytest.raises(ModelError, match=said):
        check(model)


def test_a_block_of_another_kind_is_checked_at_any_position() -> None:
    """Only the last of four blocks differs; its tensors are like those of the first."""
    model = built(lambda: LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 4})))
    model.model.layers[3].mlp.factor = 0.5
    with_forward(model.model.layers[3].mlp, lambda real, x: 0.5 * real(x))
    with pytest.raises(ModelError, match=r"model.layers.3.mlp.down_proj is not added"):
        check(model)


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "glm4"])
def test_a_branch_around_normed_parts_is_detected(kind: str) -> None:
    """Blocks whose linears do not write into a stream, with a branch around all of their steps."""
    model = built(TAKEN[kind])
    with_forward(model.model.layers[1], lambda real, hidden, **options: real(hidden, **options) + hidden.tanh())
    model.model.layers[1].gated = True
    with pytest.raises(ModelError, match=r"layers.1 has a path from its input to its output that is not in its steps"):
        check(model)


def like_llama(steps: tuple[Linears | Norm, ...]) -> tuple[Linears | Norm, ...]:
    """The steps without the norms after attention and feed-forward, and with streams."""
    found: list[Linears | Norm] = []
    for step in steps:
        if isinstance(step, Linears):
            before = found[-2] if len(found) > 1 else None
            writes = isinstance(before, Norm) and isinstance(found[-1], Linears)
            found.append(replace(step, stream=before.name) if writes and isinstance(before, Norm) else step)
        elif step.name not in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            found.append(step)
    return tuple(found)


def test_glm_4_with_the_steps_of_llama_is_refused() -> None:
    """The steps of Llama omit some norms; the check finds them under any name."""
    assert like_llama(CAUSAL_LM.blocks(TAKEN["glm4"]())[0].steps)[2] == CAUSAL_LM.blocks(llama())[0].steps[2]
    with pytest.raises(ModelError, match="o_proj is not added to the input of model.layers.0.input_layernorm"):
        check(built(TAKEN["glm4"]), with_steps(like_llama))


@pytest.mark.parametrize(("step", "said"), [(0, "layer_norm1"), (1, "self_attn.q_proj")])
def test_steps_that_reach_other_tokens_must_declare_it(step: int, said: str, clip_hub: Path) -> None:
    """CLIP's keys, values and first norm, declared as local to their token."""

    def change(blocks: list[Section]) -> list[Section]:
        return [
            replace(b, steps=(*b.steps[:step], replace(b.steps[step], mixing=()), *b.steps[step + 1 :])) for b in blocks
        ]

    scene = Scene(clip_hub)
    with pytest.raises(ModelError, match=f"{said}.* reaches other tokens"):
        check_blocks(scene.model, with_blocks(CLIP, change), {"first": scene.batches})


def test_one_sample_is_enough_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that runs out of memory beyond one sample."""
    model, seen = llama(), []

    def forward(real: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("out of memory")
        given: Tensor = real(x)
        return given

    with_forward(model.model.layers[0].mlp.down_proj, forward)
    check(model)
    assert set(seen) == {1, 2}


def test_a_run_refuses_before_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check rejects a block, and the run folder stays empty."""
    hub = decoder_files(tmp_path / "hub", llama())
    monkeypatch.setattr(self_check, "_close", lambda *_: False)
    with pytest.raises(ModelError, match="self-check"):
        run_in(tmp_path / "run", hub)
    assert not (tmp_path / "run" / "checkpoint").exists()
