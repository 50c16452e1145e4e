"""What a job has in common with others of its sweep, or with earlier runs, taken from the cache: scores of base,
experts and merge, the merge itself, and what the experts make of the calibration batches.

A key holds all that a result is made of: models by the contents of their files, samples, batches and heads by their own
contents, the options that matter, the device and the packages with epmq's own code. Classes that are not epmq's have no
such key, and lm-evaluation-harness brings data of its own: with these nothing is kept.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache as once
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.config.schema import Harness
from epmq_cli.data.batching import Batch
from epmq_cli.evaluate.score import ScoreCache, ScoredTask, compute
from epmq_cli.merge.engine import LazyMerge, SuiteModels
from epmq_cli.merge.method import Need
from epmq_cli.merge.none import NoMerge
from epmq_cli.merge.source import MergeSource
from epmq_cli.models.model_folder import ModelFolder, SafetensorsFiles
from epmq_cli.pipeline.calibration import ExpertOutputs
from epmq_cli.pipeline.fingerprints import Fingerprints, of_code, of_samples, of_tensors
from epmq_cli.pipeline.job import Job
from epmq_cli.report.metrics_json import environment
from epmq_cli.runtime import distributed
from epmq_cli.runtime.console import bar
from epmq_cli.store.cache import Cache, cache_folder
from epmq_cli.store.safetensors_writer import Entry, of

PACKAGES = ("pillow", "tokenizers", "torchvision", "open_clip_torch", "datasets", "numba", "scikit-learn")
"""That results depend on, beside those in metrics.json."""
CPU = Path("/proc/cpuinfo")
KNOWN_BY_CONTENTS = ("data", "expert", "heads", "name", "processor")
"""Fields of a task that are in keys as samples, files and heads, or that say nothing of a result."""


class CachedSteps:
    """A job's way to the cache; without one (None) everything is made. The models' files are looked at when it is made,
    right after they were opened, and again before anything is kept."""

    def __init__(self, cache: Cache | None, job: Job, models: SuiteModels, dtype: torch.dtype) -> None:
        self._cache, self._job, self._models, self._dtype = cache, job, models, dtype
        self._fingerprints = Fingerprints(cache_folder() / "fingerprints")
        self._samples: dict[str, str | None] = {}
        self._measured: dict[str, Any] = {}
        if cache is not None:
            self._files = self._read()
            cache.sound = lambda: self._files == self._read()

    @property
    def use(self) -> dict[str, int] | None:
        """What metrics.json says of the cache."""
        return None if self._cache is None else {"found": self._cache.found, "made": self._cache.made}

    def score_cache(self, stage: str) -> ScoreCache:
        """How a task's score of this stage is had: base, experts or merged."""
        if self._cache is None or isinstance(self._job.evaluation, Harness):
            return compute
        return compute if stage == "merged" and not self._known_merge else partial(self._score, stage)

    def merged(self, data: ExpertMeasurements | None = None) -> LazyMerge:
        """The merged model, whose tensors are read from the cache if that has room for them: by one of several
        processes, which is enough to fill it, and not where it is the base, which is on disk already.

        `data`: what the method measures the experts on, if it needs that. Several processes then measure together, and
        none of them asks the cache."""
        make = once(partial(LazyMerge, self._models.source, self._job.merge, self._dtype, data))
        alone = distributed.world_size() == 1 if data is not None else distributed.is_main()
        if data is not None and self._cache is not None:
            self._measured = _measured_on(data, self._job.merge.needs)
        if self._cache is None or not self._known_merge or isinstance(self._job.merge, NoMerge) or not alone:
            return make()
        with bar("keep merge", len(self._models.source.names)) as advance:
            path = self._cache.tensors(self._key("merge", model=self._merge), lambda: _merge_entries(make(), advance))
        return make() if path is None else KeptMerge(self._models.source, path, self._dtype)

    def taught(
        self, task: str, batches: Sequence[Batch], features: bool, make: Callable[[], ExpertOutputs]
    ) -> ExpertOutputs:
        """What the expert of a task makes of its batches, which `make` asks it; with features or without."""
        if self._cache is None:
            return make()
        make, drawn = once(make), [of_tensors(batch) for batch in batches]
        key = self._key("taught", model=self._expert(task), batches=drawn, features=features)
        path = self._cache.tensors(key, lambda: _taught_entries(make(), batches))
        try:
            return make() if path is None else _taught(load_file(path), batches, self._job.device)
        except (FileNotFoundError, SafetensorError):  # another job made room for its own
            return make()

    def _score(self, stage: str, task: ScoredTask, make: Callable[[], float]) -> float:
        if task.name not in self._samples:  # read once for all stages
            self._samples[task.name] = of_samples(task.samples)
        samples = self._samples[task.name]
        if self._cache is None or samples is None:
            return make()
        fed = {"samples": samples, "head": of_tensors(task.head), "batch_size": self._job.evaluation.batch_size}
        if task.processor is not None:
            fed["processor"] = self._fingerprints.model(task.processor)
        key = self._key("score", stage=stage, model=self._model(stage, task.name), task=self._fields(task.name), **fed)
        return float(self._cache.value(key, make))

    def _key(self, kind: str, **parts: Any) -> dict[str, Any]:
        family = type(self._job.family)
        general = {"family": f"{family.__module__}.{family.__qualname__}", "dtype": str(self._dtype)}
        return {"kind": kind, "in": _surroundings(self._job.device), **general, **parts}

    def _model(self, stage: str, task: str) -> dict[str, Any]:
        """What the model of a stage is made of."""
        return {"base": self._base, "experts": self._expert(task), "merged": self._merge}[stage]

    @property
    def _base(self) -> dict[str, Any]:
        """The base's files. Where vocabularies are padded its rows are made of the experts', too."""
        base, *experts = self._files.values()
        return {"base": base, "vocabulary": experts if self._models.source.padded else []}

    def _expert(self, task: str) -> dict[str, Any]:
        """An expert's files; what it lacks is the base's."""
        return {**self._base, "expert": self._files[task]}

    @property
    def _merge(self) -> dict[str, Any]:
        base, *experts = self._files.values()  # their order counts: sums are rounded on the way
        method = self._job.merge
        kind = {"merge": type(method).__qualname__, "options": vars(method), **self._measured}
        return {"base": base, "experts": experts, **kind}

    @property
    def _known_merge(self) -> bool:
        return type(self._job.merge).__module__.startswith("epmq_cli.")

    def _read(self) -> dict[str | None, dict[str, str]]:
        """The files of the base (None) and of each task's expert as they are now."""
        models: list[tuple[str | None, ModelFolder]] = [(None, self._models.base), *self._models.experts.items()]
        return {task: self._fingerprints.model(model.path) for task, model in models}

    def _fields(self, name: str) -> dict[str, Any]:
        """All that a task says of itself, but for what is known by its contents."""
        task = next(task for task in self._job.suite.members if task.name == name)
        return {key: value for key, value in vars(task).items() if key not in KNOWN_BY_CONTENTS}


class KeptMerge(LazyMerge):
    """A merged model whose tensors were made before: in a file, rounded to `dtype`."""

    def __init__(self, source: MergeSource, path: Path, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self._kept = SafetensorsFiles(path, "merge")

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, in the type it was rounded to."""
        assert dtype == self.dtype
        return self._kept.tensor(name)


def _measured_on(data: ExpertMeasurements, needs: frozenset[Need]) -> dict[str, Any]:
    """What a merge that needs data depends on beside the models: batches and, for gradients, heads, by their contents,
    and which task has which."""
    batches = {task: [of_tensors(batch) for batch in group] for task, group in data.batches.items()}
    heads = {task: of_tensors(head) for task, head in data.heads.items()} if "gradients" in needs else {}
    return {"batches": batches, "heads": heads}


def _merge_entries(merged: LazyMerge, advance: Callable[[int], None]) -> list[Entry]:
    source, dtype = merged.source, merged.dtype

    def stored(name: str) -> Tensor:
        advance(1)
        return merged.stored(name, dtype)

    return [Entry(name, dtype, source.shape(name), partial(stored, name)) for name in source.names]


def _taught_entries(taught: ExpertOutputs, drawn: Sequence[Batch]) -> list[Entry]:
    """The features, and of each batch what was not in it when it was drawn."""
    batches, features = taught
    entries = [] if features is None else [of("features", features)]
    for index, (batch, before) in enumerate(zip(batches, drawn, strict=True)):
        added = {name: tensor for name, tensor in batch.items() if before.get(name) is not tensor}
        entries += [of(f"{index}.{name}", tensor) for name, tensor in added.items()]
    return entries


def _taught(tensors: dict[str, Tensor], drawn: Sequence[Batch], device: torch.device) -> ExpertOutputs:
    batches = [dict(batch) for batch in drawn]
    features = tensors.pop("features", None)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        batches[int(index)][name] = tensor.to(device)
    return batches, None if features is None else features.to(device)


def _surroundings(device: torch.device) -> dict[str, Any]:
    """The machine and the software that results depend on, to the last bit."""
    found = {**environment(device), "device": device.type, "code": of_code(), "cpu": _cpu()}
    precision = (torch.get_float32_matmul_precision(), torch.backends.cpu.get_cpu_capability())
    return {**found, "precision": precision, "others": {name: _version(name) for name in PACKAGES}}


@once
def _cpu() -> str:
    try:
        return next(line for line in CPU.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@once
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
