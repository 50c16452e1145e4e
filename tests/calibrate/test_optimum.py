"""Oracle: the objectives written out from the layer inputs of whole models; a walk ends in their minimum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.data.batching import Batch
from epmq_cli.families.family import Family
from epmq_cli.families.structure import Linears, Norm
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.job import make_job
from tests.helpers.hubs import Walk, config, walk
from tests.helpers.tiers import first

ALPHA, BETA, LAM, RHO, READ = 0.7, 0.4, 0.02, 2.0, 0.3
FACTORS = {"first": 1.0, "second": 3.0}
GUIDANCE = (
    "guidance=feature",
    "guidance.heads=never",
    "guidance.safe=false",
    f"guidance.alpha={ALPHA}",
    f"guidance.beta={BETA}",
    f"guidance.lam={LAM}",
    f"guidance.rho={RHO}",
    f"guidance.readout_weight={READ}",
    f"+guidance.weights.second={FACTORS['second']:g}",
)
TOLERANCE = 1e-5  # of the gradient at the anchor: tensors and activations are float32

LayerInputs = dict[str, Tensor]
"""The inputs of modules over all batches of a task, by module: (tokens, width) in float64."""


@dataclass(frozen=True)
class Scene:
    """A finished walk: the base, the merged model, and per task its expert, the inputs of the student's and the
    expert's modules, and the token weights of the last block."""

    found: Walk
    base: nn.Module
    merged: nn.Module
    experts: dict[str, nn.Module]
    own: dict[str, LayerInputs]
    teacher: dict[str, LayerInputs]
    weights: dict[str, Tensor]

    def anchor(self, name: str) -> Tensor:
        return RHO * self.merged.get_parameter(name).double() + (1 - RHO) * self.base.get_parameter(name).double()

    def expert(self, task: str, name: str) -> Tensor:
        return self.experts[task].get_parameter(name).double()

    def steps(self) -> Iterator[tuple[Linears | Norm, Callable[[str], str], bool]]:
        """Every step, its names in the model, and whether it is in the last block."""
        blocks = self.found.job.family.blocks(self.found.student)
        for section in [*blocks, self.found.job.family.readout(self.found.student)]:
            for step in section.steps:
                yield step, section.name, section is blocks[-1]


def layer_inputs(model: nn.Module, family: Family, batches: Sequence[Batch]) -> tuple[LayerInputs, Tensor]:
    """The inputs of each linear and norm, and the token weights: 1 for the first token of a sample, READ for the
    others."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm) and "text" not in n}
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    weights = []
    for batch in batches:
        caught: LayerInputs = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name, to=caught: to.update({name: args[0]}))
            for name, module in modules.items()
        ]
        with torch.no_grad():
            family.features(model, batch)
        for handle in handles:
            handle.remove()
        hidden = next(iter(caught.values()))
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(hidden.shape[:2]).bool()
        for name, x in caught.items():
            rows[name].append((x[mask] if x.ndim > 2 else x).double())
        counts = torch.full(mask.shape, READ, dtype=torch.float64)
        counts[:, 0] = 1
        weights.append(counts[mask])
    return {name: torch.cat(found) for name, found in rows.items() if found}, torch.cat(weights)


def scene(hub: Path, *overrides: str) -> Scene:
    options = [*GUIDANCE, *overrides]
    found = walk(hub, *options)
    models, base, dtype = steps.open_models(make_job(config(hub, *options)))
    merged = copy.deepcopy(base)
    copy_into(merged, LazyMerge(models.source, found.job.merge, dtype))
    experts, own, teacher, weights = {}, {}, {}, {}
    for task, batches in found.batches.items():
        experts[task] = copy.deepcopy(base)
        copy_into(experts[task], models.source.model(task))
        own[task], weights[task] = layer_inputs(found.student, found.job.family, batches)
        teacher[task], _ = layer_inputs(experts[task], found.job.family, batches)
    return Scene(found, base, merged, experts, own, teacher, weights)


def linear_loss(given: Scene, name: str, stream: str | None, weighted: bool, Q: Tensor, b: Tensor | None) -> Tensor:
    """J of a linear, from design.md, sections 2 and 6."""
    total = LAM * (Q - given.anchor(f"{name}.weight")).square().sum()
    if b is not None:
        total = total + LAM * (b - given.anchor(f"{name}.bias")).square().sum()
    for task, factor in FACTORS.items():
        own, teacher = given.own[task], given.teacher[task]
        X, T = own[name], (1 - ALPHA) * own[name] + ALPHA * teacher[name]
        Y = T @ given.expert(task, f"{name}.weight").T
        if b is not None:
            Y = Y + given.expert(task, f"{name}.bias")
        if stream:
            Y = Y + BETA * (teacher[stream] - own[stream])
        w = (given.weights[task] if weighted else torch.ones(len(X)).double())[:, None]
        s = factor / torch.linalg.norm(X.T @ (w * X))
        total = total + s * (w * (X @ Q.T + (0 if b is None else b) - Y).square()).sum()
    return total


def norm_loss(given: Scene, name: str, weighted: bool, g: Tensor, b: Tensor) -> Tensor:
    """J of a layer norm, from norms.py."""
    total = LAM * (g - given.anchor(f"{name}.weight")).square().sum()
    total = total + LAM * (b - given.anchor(f"{name}.bias")).square().sum()
    eps = given.found.student.get_submodule(name).eps
    for task, factor in FACTORS.items():
        z, teacher = (
            nn.functional.layer_norm(rows[name], rows[name].shape[-1:], eps=eps)  # type: ignore[arg-type]
            for rows in (given.own[task], given.teacher[task])
        )
        y = given.expert(task, f"{name}.weight") * ((1 - ALPHA) * z + ALPHA * teacher)
        y = y + given.expert(task, f"{name}.bias")
        w = (given.weights[task] if weighted else torch.ones(len(z)).double())[:, None]
        total = total + factor / w.sum() * (w * (g * z + b - y).square()).sum()
    return total


def slope(loss: Callable[..., Tensor], at: Sequence[Tensor | None], index: int) -> float:
    """The norm of the gradient with respect to one argument."""
    points = list(at)
    point = points[index] = points[index].detach().clone().requires_grad_()  # type: ignore[union-attr]
    return float(torch.autograd.grad(loss(*points), point)[0].norm())


def assert_minimum(
    loss: Callable[..., Tensor], found: Sequence[Tensor | None], anchors: Sequence[Tensor | None], name: str
) -> None:
    """The gradients vanish, relative to those with that one argument at its anchor. Arguments whose anchor is None
    are skipped."""
    for index, anchor in enumerate(anchors):
        if anchor is not None:
            moved = [*found[:index], anchor, *found[index + 1 :]]
            here, there = (slope(loss, at, index) for at in (found, moved))
            assert here < TOLERANCE * there, f"{name}, {index}: gradient {here:.2g}, at the anchor {there:.2g}"


@pytest.mark.parametrize("quant", ["quant=none", "bits=3"])
@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_linears_are_the_minimum_and_biases_given_the_quantized_weights(
    name: str, quant: str, request: pytest.FixtureRequest
) -> None:
    given = scene(request.getfixturevalue(f"{name}_hub"), quant)
    own, checked = {n: p.double() for n, p in given.found.student.named_parameters()}, 0
    for step, full, last in given.steps():
        if isinstance(step, Norm):
            continue
        for local in step.names:
            linear, stream = full(local), full(step.stream) if step.stream else None
            loss = partial(linear_loss, given, linear, stream, last and local not in step.mixing)
            free = quant == "quant=none" or linear not in given.found.walked.weights
            anchors = [
                given.anchor(f"{linear}.weight") if free else None,
                given.anchor(f"{linear}.bias") if f"{linear}.bias" in own else None,
            ]
            assert_minimum(loss, [own[f"{linear}.weight"], own.get(f"{linear}.bias")], anchors, linear)
            checked += 1
    assert checked == 13


@pytest.mark.parametrize("name", first(1, ["bert", "clip"]))
def test_norms_are_the_minimum(name: str, request: pytest.FixtureRequest) -> None:
    given = scene(request.getfixturevalue(f"{name}_hub"), "bits=3")
    norms = [(str(given.found.job.family.stacks(given.found.student)[0].first_norm), False)]
    norms += [(full(s.name), last and not s.mixing) for s, full, last in given.steps() if isinstance(s, Norm)]
    for norm, weighted in norms:
        tensors = [f"{norm}.{part}" for part in ("weight", "bias")]
        found = [given.found.student.get_parameter(tensor).double() for tensor in tensors]
        assert_minimum(partial(norm_loss, given, norm, weighted), found, [given.anchor(t) for t in tensors], norm)
    assert len(norms) == {"clip": 6, "bert": 5}[name]
