"""Oracle: the error of the whole block, written out in float64 for all samples at once, and torch's gradients of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.activations.store import ActivationStore
from epmq_cli.calibrate.block_refinement import BlockPart, BlockProblem, Chunks
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.student import Student
from epmq_cli.data.batch_order import shuffled
from epmq_cli.families.structure import Linears, Norm, Section
from epmq_cli.quantize.formats.format import DenseWeight
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.rounding import RoundingOptions
from epmq_cli.quantize.rtn import rtn
from epmq_cli.refine.block_descent import BlockDescent, BlockErrors

WIDTH, TOKENS = 8, 5
TASKS = {"one": (7, 6), "two": (7,)}  # samples of each batch
FACTORS = {"one": 1.0, "two": 3.0}
CHUNK = 4
LINEARS = ("first", "second")
RATES = {"lr": 0.03, "scale_lr": 0.01, "norm_lr": 0.01, "bias_lr": 0.01}


def descent(**own: Any) -> BlockDescent:
    options = {
        "iterations": 20,
        "every": 5,
        "held_out": True,
        "batch_size": CHUNK,
        "lam": 0.0,
        "seed": 1,
        **RATES,
        **own,
    }
    rounding = RoundingOptions(options.pop("lr"), 1.0, options.pop("scale_lr"), (0.5, 1.1))
    return BlockDescent(rounding=rounding, **options)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor, None]:
        return x + factor * self.second(torch.tanh(self.first(self.norm(x)))), None


def block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block().eval().requires_grad_(False)


def guidance(**options: Any) -> Guidance:
    own: dict[str, Any] = dict.fromkeys(("intercepts", "norms", "embeddings", "readout"), False)
    own |= {"targets": "expert", "lam": 0.0, "alpha": 1, "beta": 1, "rho": 1, "readout_weight": 0.25, "heads": "never"}
    return Guidance(**{**own, "sweeps": 1, "task_weight": "tokens", "weights": FACTORS, **options})


def problem(
    samples: int = 100, store: ActivationStore | None = None, token: int | None = None, **options: Any
) -> BlockProblem:
    """A block with the weights of another seed, rounded to 2 bits, and padded batches."""
    module, generator, store = block(0), torch.Generator().manual_seed(5), store or ActivationStore(math.inf)
    format, weights, targets = IntFormat(2, 4, "none"), {}, {}
    for name in LINEARS:
        targets[name] = module.get_parameter(f"{name}.weight").clone()
        weights[name] = rtn(targets[name], format, "mse", torch.float32)
        module.get_parameter(f"{name}.weight").copy_(weights[name].dequantize())
    batches = {
        task: [
            {
                "x": torch.randn(count, TOKENS, WIDTH, generator=generator),
                "mask": torch.rand(count, TOKENS, generator=generator) < 0.7,
            }
            for count in counts
        ]
        for task, counts in TASKS.items()
    }
    for batch in (batch for group in batches.values() for batch in group):
        batch["mask"][:, 0] = True
    chunks, factor = Chunks(batches, samples, CHUNK), torch.tensor(0.5)
    students: dict[str, list[HiddenState]] = {}
    teachers: dict[str, list[HiddenState]] = {}
    for number, (task, parts) in enumerate(chunks.parts().items()):
        expert = block(number + 1)
        students[task] = [HiddenState(part["x"].clone(), [((factor,), {})], part["mask"], store) for part in parts]
        teachers[task] = [HiddenState(expert(part["x"] + 0.1, factor)[0], [], part["mask"], store) for part in parts]
    for state in (state for group in (*students.values(), *teachers.values()) for state in group):
        state.offload()
    section = Section("block", module, (Norm("norm"), Linears(("first",)), Linears(("second",))))
    whole = nn.ModuleDict({"block": module})
    student = Student(whole, SimpleNamespace(), SimpleNamespace(), guidance(**options), torch.float32)  # type: ignore[arg-type]
    anchors = {name: torch.zeros_like(weight) for name, weight in targets.items()}
    return BlockProblem(section, student, weights, targets, anchors, chunks.paired(students, teachers), token)


def tensors(own: BlockProblem) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in own.block.module.named_parameters()}


def naive(own: BlockProblem, values: dict[str, Tensor], held: bool, chosen: dict[str, int] | None = None) -> Tensor:
    """The relative error of the block in float64; `chosen`: of this chunk of each task alone."""
    module, error, energy = block(0).double(), torch.zeros((), dtype=torch.float64), 0.0
    for task, batches in own.parts.items():
        x, y, w, outside = (torch.cat(column) for column in zip(*columns(own, batches), strict=True))
        Y, tokens = (w.sqrt()[..., None] * y).flatten(0, 1), float(w.sum())
        frobenius = own.student.guidance.task_weight == "frobenius"
        share = FACTORS[task] * (tokens / float((Y.T @ Y).norm()) if frobenius else 1.0)
        rows = w * (outside == held)[:, None]
        if chosen is not None:
            sizes = [sum(len(part.held) for part in chunk) for batch in batches for chunk in batch]
            rows = rows * torch.cat([torch.full((n, 1), i == chosen[task]) for i, n in enumerate(sizes)])
        output = functional_call(module, values, (x, torch.tensor(0.5, dtype=torch.float64)))[0]
        error = error + share * (rows * (output - y).square().sum(-1)).sum() / rows.sum().clamp(min=1e-30)
        energy += share * float(Y.square().sum()) / tokens
    return error / energy


def columns(own: BlockProblem, batches: Sequence[Sequence[Sequence[BlockPart]]]) -> Iterator[list[Tensor]]:
    """For each part of a task: inputs, targets, weights of all tokens, and which samples are held out."""
    number = 0
    for part in (part for batch in batches for chunk in batch for part in chunk):
        assert part.student.mask is not None
        weights = torch.ones(part.student.mask.shape, dtype=torch.float64)
        if own.token is not None:
            weights.fill_(own.student.guidance.readout_weight)[:, own.token] = 1
        outside = torch.arange(number, number := number + len(weights)) % 5 == 4
        yield [part.student.hidden.double(), part.teacher.hidden.double(), weights * part.student.mask, outside]


@pytest.mark.parametrize("samples", [100, 1])
@pytest.mark.parametrize(("token", "task_weight"), [(None, "frobenius"), (0, "tokens")])
def test_errors_and_gradients_are_those_of_the_whole_block(samples: int, token: int | None, task_weight: str) -> None:
    own = problem(samples, token=token, task_weight=task_weight)
    errors, values = BlockErrors(own), tensors(own)
    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    found = errors.measure(values)
    assert found.fitted == pytest.approx(float(naive(own, exact, False).detach()), rel=1e-5)
    assert found.held == pytest.approx(float(naive(own, exact, True).detach()), rel=1e-5)
    for step in (0, 4):
        counts = {task: sum(map(len, own.parts[task])) for task in TASKS}
        chosen = {task: shuffled(count, 1, task, step // count)[step % count] for task, count in counts.items()}
        wanted = torch.autograd.grad(naive(own, exact, False, chosen), list(exact.values()))
        gradients = errors.gradients(values, step, seed=1)
        for name, gradient in zip(exact, wanted, strict=True):
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("learned", ["lr", "scale_lr", "norm_lr", "bias_lr", "all"])
def test_the_held_out_error_falls_and_is_that_of_the_result(learned: str) -> None:
    own, before = problem(), tensors(problem())
    only = RATES if learned == "all" else dict.fromkeys(RATES, 0.0) | {learned: RATES[learned]}
    found = descent(**only).refine(own)
    record, after = found.record, tensors(own)
    assert record.iteration > 0
    assert record.held_out < record.held_out_before
    exact = {name: value.double() for name, value in after.items()}
    assert record.held_out == pytest.approx(float(naive(own, exact, True).detach()), rel=1e-5)
    assert record.error == pytest.approx(float(naive(own, exact, False).detach()), rel=1e-5)
    start = {name: value.double() for name, value in before.items()}
    assert record.held_out_before == pytest.approx(float(naive(own, start, True)), rel=1e-5)
    for name, weight in found.weights.items():
        assert torch.equal(weight.dequantize(), after[f"{name}.weight"])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    norms, biases = {"norm.weight", "norm.bias"}, {"first.bias", "second.bias"}
    weights = {"first.weight", "second.weight"}
    of = {"lr": weights, "scale_lr": weights, "norm_lr": norms, "bias_lr": biases, "all": norms | biases | weights}
    assert changed == of[learned]


def test_a_block_that_gets_worse_stays_as_it_was() -> None:
    own, before = problem(), tensors(problem())
    found = descent(lr=0.0, scale_lr=0.0, norm_lr=100.0, bias_lr=100.0).refine(own)
    assert found.record.iteration == 0
    assert not found.weights
    assert found.record.held_out == found.record.held_out_before
    for name, value in tensors(own).items():
        assert torch.equal(value, before[name])


def test_the_anchor_attracts_the_weights() -> None:
    sizes = []
    for lam in (0.0, 1e3):
        own = problem()
        found = descent(lam=lam, every=1, iterations=3).refine(own)
        sizes.append(sum(float(value.square().sum()) for name, value in tensors(own).items() if "weight" in name))
        assert found.record.held_out <= found.record.held_out_before
    assert sizes[1] <= sizes[0]  # the anchor of the problem is 0


@pytest.mark.parametrize("budget", [0.0, 200.0])
def test_activations_in_files_change_nothing(budget: float) -> None:
    with ActivationStore(budget) as store:
        results = [problem(), problem(store=store)]
        records = [descent().refine(own).record for own in results]
        assert store.spilled
    assert records[0] == records[1]
    for one, other in zip(*(tensors(own).values() for own in results), strict=True):
        assert torch.equal(one, other)


def test_it_works_inside_of_inference_mode() -> None:
    with torch.inference_mode():
        inside = problem()
        found = descent().refine(inside).record
    assert found == descent().refine(problem()).record


def test_dense_weights_are_not_touched() -> None:
    own = problem()
    dense = replace(own, weights={"first": own.weights["first"]})
    assert not isinstance(own.weights["first"], DenseWeight)
    before = tensors(own)["second.weight"]
    found = descent().refine(dense)
    assert found.weights.keys() == {"first"}
    assert torch.equal(tensors(own)["second.weight"], before)


def test_without_held_out_samples_all_are_fitted() -> None:
    own = problem()
    errors, values = BlockErrors(own, held_out=False), tensors(own)
    found, split = errors.measure(values), BlockErrors(own).measure(values)
    assert found.held == found.fitted
    low, high = sorted((split.fitted, split.held))
    assert low < found.fitted < high
    record = descent(held_out=False).refine(own).record
    assert record.held_out == record.error < record.error_before
