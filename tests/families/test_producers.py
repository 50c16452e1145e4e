"""Oracle: the features of the model before a fold; a fold with any scales must not change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from epmq_cli.calibrate.fold import foldable
from epmq_cli.calibrate.student import Student
from epmq_cli.families import FAMILIES
from epmq_cli.families.structure import Linears
from epmq_cli.models.linears import in_linears
from tests.helpers.architectures import TAKEN
from tests.helpers.hubs import Scene
from tests.helpers.minihub import KINDS, Hub
from tests.helpers.tiers import only


def fold_all(student: Student, blocks: list[Any], seed: int = 0) -> int:
    """Folds random scales from 1/4 to 4 into every layer with a producer; returns their number."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for block in blocks:
        for step in foldable(block):
            names = [block.name(name) for name in step.names]
            width = student.model.get_parameter(f"{names[0]}.weight").shape[1]
            scales = 4 ** (2 * torch.rand(width, generator=generator) - 1)
            student.fold(block.name(step.producer or ""), names, scales)
            count += 1
    return count


PRODUCING = [kind for kind in KINDS if not kind.startswith("modernbert")]


@pytest.mark.parametrize("kind", only(("t5", "llama"), PRODUCING))
def test_a_fold_changes_no_output(kind: str, hub: Hub) -> None:
    scene = Scene(hub(kind))
    unused: Any = None
    student = Student(scene.model, scene.family, unused, scene.job.guidance, torch.float32)
    with torch.inference_mode():
        before = scene.family.features(scene.model, scene.batches[0])
        assert fold_all(student, scene.family.blocks(scene.model)) > 0
        after = scene.family.features(scene.model, scene.batches[0])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", TAKEN)
def test_a_fold_changes_no_output_of_any_decoder(kind: str) -> None:
    torch.manual_seed(0)
    model = in_linears(TAKEN[kind]().eval().requires_grad_(False))
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    scene = Scene.__new__(Scene)
    blocks = FAMILIES["causal_lm"].blocks(model)
    unused: Any = scene
    student = Student(model, unused, unused, unused, torch.float32)
    ids = torch.arange(1, 17)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        fold_all(student, blocks)
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_grouped_query_attention_is_not_folded(hub: Hub) -> None:
    scene = Scene(hub("llama"))
    block = scene.family.blocks(scene.model)[0]
    folded = [step.names[0] for step in foldable(block)]
    wide = (
        block.module.get_parameter("self_attn.v_proj.weight").shape[0]
        == block.module.get_parameter("self_attn.o_proj.weight").shape[1]
    )
    assert ("self_attn.o_proj" in folded) is wide
    assert {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"} <= set(folded)


def test_a_producer_that_does_not_fit_is_not_folded(hub: Hub) -> None:
    scene = Scene(hub("llama"))
    block = scene.family.blocks(scene.model)[0]
    steps = tuple(replace(step, producer=None) if isinstance(step, Linears) else step for step in block.steps)
    assert foldable(replace(block, steps=steps)) == []
