"""Oracle: the same training written out with torch's optimizer on a whole model, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmq_cli.data.batch_order import shuffled
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.families.structure import Linears, Section
from epmq_cli.refine import training
from epmq_cli.refine.muon import Muon
from epmq_cli.refine.soft_labels import Outputs, SoftLabels
from epmq_cli.refine.trained import DenseTensors
from epmq_cli.refine.training import Example, Settings, Student, Training
from epmq_cli.refine.trial import Trial, save

WIDTH, CLASSES, BATCH = 6, 4, 4
TASKS = {"one": 3, "two": 2}  # batches
WEIGHTS = {"one": 1.0, "two": 3.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block()).eval().requires_grad_(False)


def logits(features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    return features @ head["weight"].T


def sections(model: nn.Module) -> list[Section]:
    return [Section(str(number), module, (Linears(("linear",)),)) for number, module in enumerate(model)]  # type: ignore[arg-type]


FAMILY: Any = SimpleNamespace(
    heads="own",
    vocabulary=False,
    numbers=False,
    features=lambda model, batch: model(batch["x"]),
    logits=lambda model, features, head: logits(features, head),
    blocks=sections,
    stacks=lambda model: [SimpleNamespace(blocks=sections(model), lone_token=None, mask=lambda batch: None)],
)


def heads() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return {task: {"weight": torch.randn(CLASSES, WIDTH, generator=generator)} for task in TASKS}


def examples(seed: int) -> dict[str, list[list[Example]]]:
    """The examples of each batch: here one, of two views, which have the labels of two experts."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for number, (task, batches) in enumerate(TASKS.items()):
        experts, head, found[task] = [network(number + 1), network(number + 3)], heads()[task], []
        for _ in range(batches):
            x = torch.randn(BATCH, WIDTH, generator=generator)
            outputs = [Outputs(logits(expert(x), head), expert(x), (expert[0](x),)) for expert in experts]  # type: ignore[index]
            labels = [SoftLabels.of(output, 2.0, None) for output in outputs]
            found[task].append([Example({"x": x}, labels, 0)])
    return found


def student(samples: int = BATCH) -> Student:
    model = network(0)
    micro = MicroBatcher(samples, "training", "")
    names = [name for name, _ in model.named_parameters()]
    return Student(model, FAMILY, names, DenseTensors(), examples(1), examples(2), heads(), WEIGHTS, micro, seed=3)


def settings(**options: Any) -> Settings:
    own: dict[str, Any] = {
        "optimizer": "adamw",
        "temperature": 2.0,
        "features": 0.5,
        "hidden": 0.0,
        "hidden_blocks": [0],
        "anchor": 0.0,
        "epochs": 4,
        "patience": 4,
        "warmup": 0.25,
        "dtype": torch.float32,
        "checkpointing": False,
        "moments": None,
    }
    return Settings(**{**own, **options})


def losses_of(
    model: nn.Module,
    data: Mapping[str, list[list[Example]]],
    task: str,
    index: int,
    view: int = 0,
    hidden: float = 0.0,
) -> Tensor:
    """The mean loss of a view of a batch, from the definitions."""
    [example], head = data[task][index], heads()[task]
    labels = example.labels[view]
    spread, spread_behind = (
        (rows - rows.mean(0)).square().sum(1).mean()
        for rows in (
            torch.cat([part.labels[0].features for [part] in examples(1)[task]]),  # type: ignore[misc]
            torch.cat([part.labels[0].hidden[0] for [part] in examples(1)[task]]),
        )
    )
    behind = model[0](example.batch["x"])  # type: ignore[index]
    features = model[1](behind)  # type: ignore[index]
    p, log_q = labels.kept.exp(), (logits(features, head) / 2).log_softmax(-1)
    divergence = 4 * (p * (p.log() - log_q)).sum(-1).mean()
    error = 0.5 * (features - labels.features).square().sum(1).mean() / spread
    return divergence + error + hidden * (behind - labels.hidden[0]).square().sum(1).mean() / spread_behind


def held(model: nn.Module, hidden: float = 0.0) -> tuple[float, float]:
    """The loss of the held-out samples, and the share of them with the expert's class; means of tasks by weight."""
    with torch.no_grad():
        loss = share = 0.0
        for task, count in TASKS.items():
            own_losses = [float(losses_of(model, examples(2), task, i, hidden=hidden)) for i in range(count)]
            loss += WEIGHTS[task] / 4 * sum(own_losses) / count
            parts = [part for [part] in examples(2)[task]]
            own = torch.cat([logits(model(part.batch["x"]), heads()[task]) for part in parts]).argmax(1)
            wanted = torch.cat([part.labels[0].kept for part in parts]).argmax(1)
            share += WEIGHTS[task] / 4 * float((own == wanted).float().mean())
    return loss, share


def trained(
    anchor: float = 0.0, muon: bool = False, hidden: float = 0.0
) -> tuple[list[tuple[float, float]], list[dict[str, Tensor]]]:
    """The held-out losses and the weights, before the first epoch and after each."""
    model, data, steps = network(0).requires_grad_(True), examples(1), max(TASKS.values())
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    matrices = [model[0].linear.weight, model[1].linear.weight] if muon else []  # type: ignore[union-attr]
    rest = [tensor for tensor in model.parameters() if not any(tensor is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, weight_decay=0.0)]
    if muon:
        optimizers.append(Muon(matrices))
    total, rising = 4 * steps, 3
    found, states = [held(model, hidden)], [start]
    for step in range(total):
        model.zero_grad()
        for task, count in TASKS.items():
            index = shuffled(count, 3, task, step // count)[step % count]
            (WEIGHTS[task] / 4 * losses_of(model, data, task, index, step // count % 2, hidden)).backward()
        distance = sum(
            (tensor - start[name]).square().sum() / start[name].square().sum().clamp(min=1e-12)
            for name, tensor in model.named_parameters()
        )
        (anchor * distance).backward()  # type: ignore[union-attr]
        falling = (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 * ((step + 1) / rising if step < rising else falling)
            optimizer.step()
        if step % steps == steps - 1:
            found.append(held(model, hidden))
            states.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
    return found, states


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (BATCH, {}),
        (1, {"anchor": 0.01}),
        (BATCH, {"checkpointing": True}),
        (3, {"moments": torch.device("cpu")}),
        (BATCH, {"optimizer": "muon"}),
        (3, {"hidden": 0.7}),
    ],
)
def test_the_steps_and_losses_are_those_of_the_optimizers(samples: int, options: dict[str, Any]) -> None:
    trial, best = Training(student(samples), settings(**options)).run(0.02)
    found, states = trained(options.get("anchor", 0.0), "optimizer" in options, options.get("hidden", 0.0))
    assert trial.losses == pytest.approx([loss for loss, _ in found], rel=1e-4)
    assert trial.agreements == pytest.approx([share for _, share in found], rel=1e-4)
    allowed = [epoch for epoch, (_, share) in enumerate(found) if share >= found[0][1]]
    assert trial.best == min(allowed, key=lambda epoch: found[epoch]) > 0
    torch.testing.assert_close(best, states[trial.best], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_training_continues_to_the_same_weights(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings(optimizer=optimizer)
    wanted = Training(student(), own).run(0.02)
    path = tmp_path / "state.safetensors"

    def interrupted(path: Path, trial: Trial, *arguments: Any) -> None:
        save(path, trial, *arguments)
        if len(trial.losses) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save", interrupted)
        Training(student(), own).run(0.02, path)
    found = Training(student(), own).run(0.02, path)
    assert found[0] == wanted[0]
    for name, tensor in wanted[1].items():
        assert torch.equal(found[1][name], tensor)


def test_training_that_does_not_help_returns_the_start() -> None:
    trial, best = Training(student(), settings(epochs=2)).run(1e3)
    assert not trial.better
    for name, tensor in network(0).named_parameters():
        assert torch.equal(best[name], tensor)


def test_epochs_without_a_lower_loss_end_the_training(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    every, _ = Training(student(), settings(epochs=8, patience=8, anchor=1.0)).run(1.0)
    trial, _ = Training(student(), settings(epochs=8, patience=2, anchor=1.0)).run(1.0, path)
    rise = next(epoch for epoch in range(2, 9) if min(every.losses[: epoch - 1]) <= min(every.losses[: epoch + 1]))
    assert trial.losses == every.losses[: rise + 1]
    assert len(trial.losses) < 9
    assert Training(student(), settings(epochs=8, patience=2, anchor=1.0)).run(1.0, path)[0] == trial


def test_bfloat16_is_near_float32() -> None:
    trial, _ = Training(student(), settings(dtype=torch.bfloat16)).run(0.02)
    wanted = [loss for loss, _ in trained()[0]]
    assert trial.losses == pytest.approx(wanted, rel=0.1)
    assert trial.losses != pytest.approx(wanted, rel=1e-6)
