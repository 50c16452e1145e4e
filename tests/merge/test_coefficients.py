"""Oracles: gradient descent in float64 through the sum of coefficients times task vectors; closed forms on a few
numbers; Task Arithmetic without any step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.data.batch_order import own_numbers, shuffled
from epmq_cli.errors import ConfigError
from epmq_cli.merge.adamerging import entropy
from epmq_cli.merge.coefficients import agreeing, differences
from epmq_cli.merge.soft_merging import distance
from epmq_cli.runtime import distributed
from tests.helpers.merging import SHAPES, GivenData, RandomBatches, merged, method, tensors

EXPERTS = [tensors(seed) for seed in (1, 2)]
TASKS = {f"t{i}": expert for i, expert in enumerate(EXPERTS)}
NAMES = ("adamerging", "soft_merging")


def model(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ weights["a.weight"].T + weights["a.bias"]
    return weights["scalar"] * hidden @ weights["b.weight"].T


def loss(name: str, weights: dict[str, Tensor], task: str, x: Tensor) -> Tensor:
    """The mean loss of a batch, from the definitions."""
    q = model(weights, x).softmax(-1)
    if name == "adamerging":
        return -(q * q.log()).sum(-1).mean()
    p = (model({part: tensor.double() for part, tensor in TASKS[task].items()}, x) / 2).softmax(-1)
    q = (model(weights, x) / 2).softmax(-1)
    return 4 * (p * (p / q).log()).sum(-1).mean()


def descended(name: str, granularity: str, steps: int, lr: float, batch_size: int) -> dict[str, Tensor]:
    """The merge after Adam's steps, differentiated with respect to the coefficients themselves."""
    base = {part: tensor.double() for part, tensor in tensors(0).items()}
    rows = len(SHAPES) if granularity == "layer" else 1
    own = torch.full((2, rows), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([own], lr=lr)

    def weights() -> dict[str, Tensor]:
        return {
            part: value + sum(own[i, k % rows] * (TASKS[f"t{i}"][part].double() - value) for i in range(2))
            for k, (part, value) in enumerate(base.items())
        }

    for step in range(steps):
        adam.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for task in TASKS:
            parts = [part for batch in RandomBatches()[task] for part in batch["x"].split(batch_size)]
            index = shuffled(len(parts), 5, task, step // len(parts))[step % len(parts)]
            total = total + loss(name, weights(), task, parts[index].double())
        total.backward()
        adam.step()
    return {part: tensor.detach() for part, tensor in weights().items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("granularity", "memory"), [("layer", 1 << 30), ("layer", 300), ("task", 0)])
def test_coefficients_follow_adam_on_the_mean_losses(name: str, granularity: str, memory: int, tmp_path: Path) -> None:
    options = {"coefficients": granularity, "steps": 12, "lr": 0.02, "batch_size": 3, "seed": 5}
    found = merged(tmp_path / "x", method(name, **options), tensors(0), EXPERTS, GivenData(memory=memory))
    wanted = descended(name, granularity, 12, 0.02, 3)
    for part in SHAPES:
        torch.testing.assert_close(found[part].double(), wanted[part], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_without_steps_it_is_task_arithmetic(name: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method(name, steps=0), tensors(0), EXPERTS)
    wanted = merged(tmp_path / "y", method("task_arithmetic", scale=0.3), tensors(0), EXPERTS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_soft_merging_finds_the_expert_again(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("soft_merging", steps=400, lr=0.02), tensors(0), EXPERTS[:1])
    for part in ("a.weight", "b.weight", "scalar"):
        torch.testing.assert_close(found[part], EXPERTS[0][part], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    options = {"steps": 5, "lr": 0.02, "batch_size": 2}
    found = [
        merged(tmp_path / str(i), method(name, seed=seed, **options), tensors(0), EXPERTS)["a.weight"]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_ties_vectors_are_trimmed_and_agree_with_the_sign_of_their_sum(tmp_path: Path) -> None:
    zero = torch.zeros(4)
    experts = {"t0": torch.tensor([3.0, -1.0, 0.5, 2.0]), "t1": torch.tensor([-2.0, -4.0, 0.1, -2.0])}
    for majority, last in ((1.0, [2.0, 0.0]), (-1.0, [0.0, -2.0])):
        found = torch.stack(agreeing(zero, experts, [0.6, 0.6], majority))
        assert found.tolist() == [[3.0, -1.0, 0.0, last[0]], [0.0, -4.0, 0.0, last[1]]]
    scalar = agreeing(torch.zeros(()), {"t0": torch.tensor(2.0)}, [1.0], 1.0)
    assert [vector.item() for vector in scalar] == [2.0]
    one = merged(tmp_path / "x", method("adamerging", vectors="ties", density=1, steps=3), tensors(0), EXPERTS[:1])
    plain = merged(tmp_path / "y", method("adamerging", steps=3), tensors(0), EXPERTS[:1])
    torch.testing.assert_close(one, plain)


def test_ties_vectors_sum_to_ties(tmp_path: Path) -> None:
    for density in (0.2, 1.0):
        options = {"vectors": "ties", "density": density, "steps": 0}
        found = merged(tmp_path / f"x{density}", method("adamerging", **options), tensors(0), EXPERTS)
        wanted = merged(tmp_path / f"y{density}", method("ties", density=density), tensors(0), EXPERTS)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_processes_share_the_parts_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the parts of five batches in order, whose batches processes take in turn."""
    parts = [2, 2, 2, 2, 1]
    assert own_numbers(parts) == [*range(9)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "all_gather", lambda _: [parts[::2], parts[1::2]])
    for rank, wanted in enumerate(
        ([0, 1, None, None, 2, 3, None, None, 4], [None, None, 0, 1, None, None, 2, 3, None])
    ):
        monkeypatch.setenv("RANK", str(rank))
        assert own_numbers(parts[rank::2]) == wanted


def test_losses_of_a_few_logits() -> None:
    even, sure = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[0.0, 1e4]], dtype=torch.float64)
    assert entropy(even).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert entropy(sure).item() == 0
    assert distance(sure, sure, 2).item() == 0
    assert distance(torch.zeros(1, 2).double(), torch.tensor([[0.0, 2.0]]).double(), 2).item() == pytest.approx(
        4 * sum(p * torch.tensor(2 * p).log().item() for p in (1 / (1 + torch.e), torch.e / (1 + torch.e)))
    )
    assert entropy(torch.tensor([[3.0]])).item() == 0
    assert distance(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 2).item() == 2


def test_task_vectors_are_differences() -> None:
    assert torch.equal(
        differences(tensors(0)["a.bias"], {"t": tensors(1)["a.bias"]})[0], tensors(1)["a.bias"] - tensors(0)["a.bias"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "block"}, r"merge.coefficients must be one of layer, task"),
        ({"vectors": "dare"}, r"merge.vectors must be one of plain, ties"),
        ({"lr": 0}, r"merge.lr must be a number in \(0, 1\], got 0"),
        ({"steps": 1.5}, r"merge.steps must be a whole number in \[0, 1000000\], got 1.5"),
        ({"temperature": 0}, r"merge.temperature must be a number in \(0, 100\], got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        method("soft_merging", **options)
    assert isinstance(error.value.__cause__ or error.value, ConfigError)
