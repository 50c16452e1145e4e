"""The steps of `epmq run` that train the calibrated model, before it is quantized and afterwards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.progress import WalkResult
from epmq_cli.config import instantiate
from epmq_cli.data.batching import Batch, Batches, size
from epmq_cli.data.held_out import check_enough, filled, hold_out
from epmq_cli.evaluate.score import ScoredTask
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.weights import copy_into
from epmq_cli.pipeline.calibration import Anchor, calibrate, summary
from epmq_cli.pipeline.context import RunContext
from epmq_cli.pipeline.progress import RunProgress
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.none import NoQuantizer
from epmq_cli.refine.distill import AUTO, Distill, own
from epmq_cli.refine.soft_labels import SoftLabels
from epmq_cli.refine.trained import PackedTensors, RoundedTensors, Trained
from epmq_cli.refine.training import Examples, Student, Training, matrices
from epmq_cli.refine.trial import Trial

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""The tensors of a training, and its entries of metrics.json."""


@dataclass(frozen=True)
class Refined:
    """A refined model in place of the merge: the tensors that quantization approximates."""

    source: MergeSource
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """The refined tensor of this name."""
        return self.tensors[name]


@dataclass(frozen=True)
class Refinement:
    """What follows the refinement: `context`, `anchor` and `batches` of the walk that quantizes, and entries of
    metrics.json."""

    context: RunContext
    anchor: Anchor
    batches: Batches
    entries: dict[str, Any]


class Refiner:
    """Refines a run's model twice: before it is quantized, and afterwards. `batches`: the calibration batches.

    What the experts put out is computed when it is needed first, and overwrites the model's merged tensors.
    """

    def __init__(
        self, context: RunContext, model: nn.Module, batches: Batches, tasks: Sequence[ScoredTask], source: MergeSource
    ) -> None:
        self._context, self._model, self._tasks, self._source = context, model, tasks, source
        self._distill = context.job.refine if isinstance(context.job.refine, Distill) else None
        self._batches = batches
        self._entry: dict[str, Any] = {}
        self._kept: tuple[Examples, Examples] | None = None
        if self._distill is not None:
            self._distill.blocks(model, context.job.family)
            for task, group in batches.items():
                check_enough(task, group, "refine=distill")

    @property
    def _trainable(self) -> list[str]:
        """The merged tensors but for factors, whose steps take them to be 1."""
        return [name for name in self._source.names if not self._context.job.family.is_folded(name)]

    @property
    def entries(self) -> dict[str, Any]:
        """The entries of metrics.json."""
        return {"refine": self._entry} if self._entry else {}

    def dense(self, merged: LazyMerge) -> Refinement:
        """Calibrates the merged model without quantizing it, on four fifths of the samples, and trains the result. The
        model then holds the refined weights.

        If training does not lower the loss on the last fifth, the model is the merged one again, and the walk that
        quantizes starts from it. If the packed model is trained too, that walk does not see the last fifth either,
        which then chooses the epoch of the second training.
        """
        context, distill, model = self._context, self._distill, self._model
        if distill is None:
            return Refinement(context, merged, self._batches, {})
        batches = filled(self._parts[0]) if distill.packed_epochs else self._batches
        if not distill.epochs:
            return Refinement(context, merged, batches, {})
        job, progress = context.job, context.progress.part("refine")
        before = self._copy()

        def train() -> Result:
            fitted, _ = self._parts
            dense = replace(context, job=replace(job, quantizer=NoQuantizer()), progress=progress)
            trained = distill.updates(model, job.family, job.seed)
            student = self._student(distill.names(model, self._trainable), trained)
            copy_into(model, before)
            calibrated = calibrate(dense, model, filled(fitted), self._tasks, merged)
            start = self._copy()
            rates = distill.rates(distance(merged, matrices(job.family, model)) if distill.lr == AUTO else 0.0)
            trials, best = Training(student, distill.settings(job.device)).try_rates(rates, progress.folder)
            found = {"dense": _entry(trials, best), "guidance": summary(job, calibrated)}
            tensors = {name: trained.tensor(name, numbers) for name, numbers in best.items()}
            return start | tensors if best else {}, found

        tensors, measured = _kept(progress, "tensors", job.device, train)
        self._entry["dense"] = measured["dense"]
        if not tensors:
            copy_into(model, before)
            return Refinement(context, merged, batches, {})
        copy_into(model, tensors)
        guided = replace(context, job=replace(job, guidance=_asymmetric(job.guidance)))
        return Refinement(
            guided, Refined(merged.source, merged.dtype, tensors), batches, {"guidance": measured["guidance"]}
        )

    def packed(self, walk: WalkResult, dtype: torch.dtype) -> None:
        """Trains the codes or scales, the norms and the biases of the quantized model. `walk` receives the new weights;
        its records stay. `dtype`: the type in which the checkpoint stores tensors.

        If training does not lower the loss on the last fifth of the samples, nothing changes.
        """
        distill, model, job = self._distill, self._model, self._context.job
        if distill is None or not distill.packed_epochs:
            return
        progress = self._context.progress.part("packed")
        every = {f"{name}.weight": weight for name, weight in walk.weights.items()}
        weights = {name: weight.to(job.device) for name, weight in every.items() if isinstance(weight, QuantizedWeight)}
        trained = (RoundedTensors if distill.packed == "codes" else PackedTensors)(weights, dtype)

        def train() -> Result:
            before = self._copy()
            names = [*weights, *distill.norms(model, self._source.names)]
            student = self._student(names, trained)
            copy_into(model, before)
            training = Training(student, distill.settings(job.device, packed=True))
            trials, best = training.try_rates([distill.packed_lr], progress.folder)
            copy_into(model, before)
            return best, _entry(trials, best)

        best, self._entry["packed"] = _kept(progress, "numbers", job.device, train)
        copy_into(model, ((name, trained.tensor(name, numbers)) for name, numbers in best.items()))
        for name in weights if best else ():
            walk.weights.add(name.removesuffix(".weight"), trained.weight(name, best[name]))

    def _student(self, names: Sequence[str], trained: Trained) -> Student:
        """The model as a student of the experts. Overwrites its merged tensors."""
        job, (fitted, held) = self._context.job, self._examples()
        return Student(
            model=self._model,
            family=job.family,
            names=names,
            trained=trained,
            fitted=fitted,
            held=held,
            heads={task.name: own(task.head) for task in self._tasks},
            weights={task.name: job.guidance.factor(task.name) for task in self._tasks},
            micro=self._context.micro,
            seed=job.seed,
        )

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._model.named_parameters()}

    @cached_property
    def _parts(self) -> tuple[Batches, Batches]:
        """The samples that are fitted, and those that are held out."""
        return hold_out(self._batches)

    def _examples(self) -> tuple[Examples, Examples]:
        """The batches of both parts with the outputs of their experts, of the first part for every view. They are kept
        if both trainings need them."""
        assert self._distill is not None
        fitted, held = self._parts
        found = self._kept or (self._labelled(fitted, self._distill.views), self._labelled(held, 1))
        self._kept = found if self._distill.epochs and self._distill.packed_epochs else None
        return found

    def _labelled(self, batches: Batches, views: int) -> Examples:
        job, distill, micro, found = self._context.job, self._distill, self._context.micro, {}
        assert distill is not None
        for task in self._tasks:
            copy_into(self._model, self._source.model(task.name))
            labels = partial(distill.labels, self._model, job.family, own(task.head))

            def label(batch: Batch, labels: Callable[[Batch, int], SoftLabels] = labels) -> SoftLabels:
                return micro.run(partial(labels, batch), count=size(batch))

            found[task.name] = distill.labelled(batches[task.name], views, job.seed, label)
        return found


def distance(merged: LazyMerge, names: Iterable[str]) -> float:
    """How far the experts' weights are from the merged ones: root mean square of a matrix, the median over `names`."""
    source, found = merged.source, []
    for name in names:
        anchor = merged.tensor(name)
        squares = [float((source.expert(task, name) - anchor).square().mean()) for task in source.tasks]
        found.append(math.sqrt(statistics.fmean(squares)))
    return statistics.median(found)


def _kept(progress: RunProgress, name: str, device: torch.device, train: Callable[[], Result]) -> Result:
    """The tensors and entries that a training returns, or returned in an earlier process. Entries are written first,
    because a process that finds the tensors does not train."""
    entries: dict[str, Any] = {}

    def make() -> dict[str, Tensor]:
        tensors, found = train()
        entries.update(progress.value("entries", lambda: found))
        return tensors

    tensors = progress.tensors(name, device, make)
    return tensors, entries or progress.value("entries", dict)


def _entry(trials: Sequence[Trial], best: Mapping[str, Tensor]) -> dict[str, Any]:
    """The entry of metrics.json about a training."""
    return {"trials": [{**asdict(trial), "best": trial.best} for trial in trials], "refined": bool(best)}


def _asymmetric(guidance: Guidance) -> Guidance:
    """`guidance=asymmetric`, which quantizes towards a model's own outputs, with the given guidance's heads and
    weights."""
    node = OmegaConf.load(instantiate.conf_dir() / "guidance" / "asymmetric.yaml")
    assert isinstance(node, DictConfig)
    asymmetric: Guidance = instantiate.build("guidance", node)
    return replace(
        asymmetric,
        heads=guidance.heads,
        weights=guidance.weights,
        task_weight=guidance.task_weight,
        prompt_weight=guidance.prompt_weight,
    )
