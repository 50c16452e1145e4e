"""Small models to merge, and calibration data for the methods that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq_cli.config.instantiate import conf_dir
from epmq_cli.data.batching import Batch
from epmq_cli.data.held_out import Subset, members
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.method import Loss, MergeGroups, MergeMethod, Weights
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.model_folder import ModelFolder

SHAPES = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (5, 4), "scalar": ()}
LINEARS = [("a",), ("b",)]
SHARES = {"all": 1.0, "fitted": 0.8, "held": 0.2}
FEW = {"adamerging": {"steps": 20}, "soft_merging": {"steps": 20}, "wudi": {"iterations": 20}}
"""Options of methods that take many small steps."""
METHODS = sorted(path.stem for path in (conf_dir() / "merge").glob("*.yaml") if "???" not in path.read_text())
"""The methods that merge experts without further files."""


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Normally distributed tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, content: dict[str, Tensor], config: str = "{}") -> ModelFolder:
    """Writes a model folder."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config)
    save_file(content, path / "model.safetensors")
    return ModelFolder(path, path.name)


Experts = Sequence[dict[str, Tensor]] | Mapping[str, dict[str, Tensor]]
"""The experts' tensors, by task or of tasks t0, t1, ..."""


def source(path: Path, base: dict[str, Tensor], experts: Experts, config: str = "{}") -> MergeSource:
    """Writes base and experts to folders in `path`."""
    named = experts if isinstance(experts, Mapping) else {f"t{i}": content for i, content in enumerate(experts)}
    tensors = {task: own_names(folder(path / task, content)) for task, content in named.items()}
    return MergeSource(own_names(folder(path / "base", base, config)), tensors)


def own_names(opened: ModelFolder) -> NamedTensors:
    """All tensors of a folder, under the names in its files."""
    return NamedTensors(opened, {name: name for name in opened.infos})


def method(name: str, **options: Any) -> MergeMethod:
    """A shipped method with its defaults and `FEW`, or with some other options."""
    cfg = OmegaConf.create({"seed": 0, "merge": OmegaConf.load(conf_dir() / "merge" / f"{name}.yaml")})
    options = FEW.get(name, {}) | options
    made: MergeMethod = hydra.utils.instantiate(cfg.merge, **options, _convert_="all")
    return made


def taken(name: str, most: int = 3) -> int:
    """The number of experts to give a method: `most`, or the largest number that it merges."""
    if name == "passthrough":  # takes several with slices alone
        return 1
    _, largest = getattr(type(method(name)), "experts", (1, None))
    return min(most, largest or most)


class RandomBatches(dict[str, list[Batch]]):
    """Two batches of inputs for any task."""

    def __missing__(self, task: str) -> list[Batch]:
        return [{"x": x} for x in tensors(sum(task.encode()), {"x": (12, 6)})["x"].split(8)]


@dataclass(frozen=True)
class GivenData:
    """Precomputed calibration data; tasks and linears without data get random ones. `inputs`: those of linears, a
    sample a row, in place of moments. The model of its gradients is b(a(x)) times the scalar, without `b.bias`."""

    fisher: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    memory: int = 1 << 30
    batches: Mapping[str, Sequence[Batch]] = field(default_factory=RandomBatches)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: dict[str, Tensor] = field(default_factory=dict)

    def expert(self, task: str) -> nn.Module:
        raise NotImplementedError

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.update(weights)

    def logits(self, task: str, batch: Batch) -> Tensor:
        own = self.model
        hidden = batch["x"].to(own["a.weight"].dtype) @ own["a.weight"].T + own["a.bias"]
        return own["scalar"] * hidden @ own["b.weight"].T

    def gradients(self, task: str, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        for tensor in self.model.values():
            tensor.requires_grad_()
        mean = loss(self.logits(task, batch), slice(0, len(batch["x"]))).mean()
        found = torch.autograd.grad(mean, list(self.model.values()), allow_unused=True)
        return {name: x for name, x in zip(self.model, found, strict=True) if x is not None}

    def linear_groups(self) -> list[tuple[str, ...]]:
        return LINEARS

    def input_moments(self, task: str, linears: Sequence[str], subset: Subset = "all") -> dict[str, Tensor]:
        own = {name: SHAPES[f"{name}.weight"][1] for name in linears}
        random = tensors(sum(task.encode()), {name: (9, width) for name, width in own.items()})
        rows = {name: self.inputs.get(task, {}).get(name, x).double() for name, x in random.items()}
        chosen = {name: X if (some := members(subset, [len(X)])[0]) is None else X[some] for name, X in rows.items()}
        given = {name: G * SHARES[subset] for name, G in self.moments.get(task, {}).items()}
        return {name: given.get(name, X.T @ X / len(rows[name])) for name, X in chosen.items()}

    def merge_sections(self, start: Weights, merge: MergeGroups) -> dict[str, Tensor]:
        return {name: W for group in LINEARS for name, W in merge([group], self.input_moments).items()}

    def squared_gradients(self, task: str, classes: int | None) -> dict[str, Tensor]:
        random = {name: tensor.square() for name, tensor in tensors(sum(task.encode())).items()}
        return {name: values.clone() for name, values in self.fisher.get(task, random).items()}


def merged(
    path: Path, merge: MergeMethod, base: dict[str, Tensor], experts: Experts, data: GivenData | None = None
) -> dict[str, Tensor]:
    """The merged tensors."""
    given = (data or GivenData()) if merge.needs else None
    return dict(LazyMerge(source(path, base, experts), merge, torch.float32, given))
