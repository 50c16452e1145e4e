"""Caches the results that runs share: scores of base, experts and merge, the merge itself, and the experts' outputs on
the calibration batches.

A key contains everything that a result depends on (keys.py). Results of classes outside of epmq, and of
lm-evaluation-harness, which reads its own data, are not cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from epmq_cli.calibrate.merge_data import ExpertMeasurements
from epmq_cli.config.schema import Harness, cache_bytes
from epmq_cli.data.batching import Batch
from epmq_cli.evaluate.metrics import Score
from epmq_cli.evaluate.score import ScoreCache, ScoredTask, compute
from epmq_cli.merge.engine import LazyMerge
from epmq_cli.merge.given import Given
from epmq_cli.merge.method import Need
from epmq_cli.merge.none import NoMerge
from epmq_cli.merge.slices import sliced
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.pipeline.job import Job
from epmq_cli.pipeline.keys import environment, hash_model, hash_samples, scores_key
from epmq_cli.runtime import distributed
from epmq_cli.runtime.progress import bar
from epmq_cli.store.cache import Cache, FileHashes, cache_folder
from epmq_cli.store.hashing import hash_tensors
from epmq_cli.store.safetensors_writer import Entry, of

ON_DISK = (Given, NoMerge)
IN_OTHER_PARTS = ("data", "expert", "heads", "name", "processor")
"""Fields of a task that are not part of a key. Its samples, files and heads are."""


def open_cache(size: object) -> Cache | None:
    """The cache for an option such as cache=10GB; None for cache=false."""
    count = cache_bytes(size)
    return None if count is None else Cache(cache_folder() / "jobs", count)


class CachedSteps:
    """The cached steps of a job. Without a cache (None) every result is computed.

    The models' files are hashed right after they are opened, and again before an entry is written.
    """

    def __init__(self, cache: Cache | None, job: Job, models: SuiteModels, dtype: torch.dtype) -> None:
        self._cache, self._job, self._models, self._dtype = cache, job, models, dtype
        self._hashes = FileHashes(None if cache is None else cache_folder() / "fingerprints")
        self._samples_hashes: dict[str, str | None] = {}
        self._measured: dict[str, Any] = {}
        if cache is not None:
            files = self.files
            cache.sound = lambda: files == self._read()

    @cached_property
    def files(self) -> dict[str, dict[str, str]]:
        """The sha256 of the files of `base` and of each `expert of TASK`."""
        return self._read()

    @property
    def use(self) -> dict[str, int] | None:
        """The entry of metrics.json about the cache."""
        return None if self._cache is None else {"found": self._cache.found, "made": self._cache.made}

    def scores_key(self, tasks: Sequence[ScoredTask]) -> str | None:
        """A hash of the job's evaluation and of the test samples. None if they cannot be hashed."""
        return scores_key(self._job.evaluation, [self._samples(task) for task in tasks])

    def score_cache(self, stage: str) -> ScoreCache:
        """Caches the scores of a stage: base, experts or merged."""
        if self._cache is None or isinstance(self._job.evaluation, Harness):
            return compute
        return compute if stage == "merged" and not self._known_merge else partial(self._score, stage)

    def merged(self, data: ExpertMeasurements | None = None, stacked: LazyMerge | None = None) -> LazyMerge:
        """The merged model. Its tensors are read from the cache if they fit. Of several processes, only the main one
        uses the cache. `merge=none` and `merge=given` do not, because their results are on disk.

        `data`: the measurements of the experts, if the method needs them. Several processes measure together; then none
        of them uses the cache. `stacked`: the merge itself, if it changes the layers.
        """
        job, source = self._job, self._models.source if stacked is None else stacked.source

        @once
        def make() -> LazyMerge:
            return stacked or LazyMerge(source, job.merge, self._dtype, data, job.device)

        uses_cache = distributed.world_size() == 1 if data is not None else distributed.is_main()
        if data is not None and self._cache is not None:
            self._measured = _measured_on(data, self._job.merge.needs)
        if self._cache is None or not self._known_merge or isinstance(self._job.merge, ON_DISK) or not uses_cache:
            return make()
        with bar("keep merge", len(source.names)) as advance:
            path = self._cache.tensors(self._key("merge", model=self._merge), lambda: _merge_entries(make(), advance))
        return make() if path is None else CachedMerge(source, path, self._dtype)

    def teacher_tensors(
        self, task: str, batches: Sequence[Batch], features: bool, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What a task's expert adds to its batches, which `make` computes, on the device. `features`: whether its
        features are among it."""
        if self._cache is None:
            return make()
        make, drawn = once(make), [hash_tensors(batch) for batch in batches]
        key = self._key("taught", model=self._expert(task), batches=drawn, features=features)
        path = self._cache.tensors(key, lambda: [of(name, tensor) for name, tensor in make().items()])
        try:
            from safetensors.torch import load_file  # imports torch

            return make() if path is None else load_file(path, device=str(self._job.device))
        except (FileNotFoundError, SafetensorError):  # another run evicted it
            return make()

    def _score(self, stage: str, task: ScoredTask, make: Callable[[], Score]) -> Score:
        samples = self._samples(task)
        if self._cache is None or samples is None:
            return make()
        inputs = {"samples": samples, "head": hash_tensors(task.head), "batch_size": self._job.evaluation.batch_size}
        if task.processor is not None:
            inputs["processor"] = hash_model(task.processor, self._hashes)
        model, fields = self._model(stage, task.name), self._fields(task.name)
        return Score(*self._cache.value(self._key("score", stage=stage, model=model, task=fields, **inputs), make))

    def _samples(self, task: ScoredTask) -> str | None:
        if task.name not in self._samples_hashes:  # read once for all stages
            self._samples_hashes[task.name] = hash_samples(task.samples)
        return self._samples_hashes[task.name]

    def _key(self, kind: str, **parts: Any) -> dict[str, Any]:
        job = self._job
        general = {"family": job.family.name, "dtype": str(self._dtype), "transform": job.transform}
        return {"kind": kind, "in": environment(self._job.device), **general, **parts}

    def _model(self, stage: str, task: str) -> dict[str, Any]:
        """Everything that the model of a stage depends on."""
        return {"base": self._base, "experts": self._expert(task), "merged": self._merge}[stage]

    @property
    def _base(self) -> dict[str, Any]:
        """The base's files. If vocabularies are padded, its rows also depend on the experts."""
        base, *experts = self.files.values()
        return {"base": base, "vocabulary": experts if self._models.source.padded else []}

    def _expert(self, task: str) -> dict[str, Any]:
        """The files of an expert and of the base, which contains the tensors that the expert lacks."""
        return {**self._base, "expert": self.files[f"expert of {task}"]}

    @property
    def _merge(self) -> dict[str, Any]:
        base, *experts = self.files.values()  # their order matters, because sums are rounded
        method = self._job.merge
        options = repr(method) if sliced(method) else vars(method)
        kind = {"merge": type(method).__qualname__, "options": options, **self._measured}
        return {"base": base, "experts": experts, **kind}

    @property
    def _known_merge(self) -> bool:
        parts = [part.method for own in (sliced(self._job.merge) or {}).values() for part in own]
        return all(type(method).__module__.startswith("epmq_cli.") for method in (self._job.merge, *parts))

    def _read(self) -> dict[str, dict[str, str]]:
        experts = {f"expert of {task}" if task else "given merge": e for task, e in self._models.experts.items()}
        further = self._job.family.further_files
        return {
            role: hash_model(model.path, self._hashes) | self._hashes.files(further(model.path))
            for role, model in {"base": self._models.base, **experts}.items()
        }

    def _fields(self, name: str) -> dict[str, Any]:
        """A task's fields that are part of a key."""
        task = next(task for task in self._job.suite.members if task.name == name)
        return {key: value for key, value in vars(task).items() if key not in IN_OTHER_PARTS}


class CachedMerge(LazyMerge):
    """A merged model in a file of the cache, with tensors of type `dtype`."""

    def __init__(self, source: MergeSource, path: Path, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self._files = SafetensorsFiles(path, "merge")

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, in the file's type."""
        assert dtype == self.dtype
        return self._files.tensor(name)


def _measured_on(data: ExpertMeasurements, needs: frozenset[Need]) -> dict[str, Any]:
    """The data that a merge depends on: the batches of each task and, for gradients, its head."""
    batches = {task: [hash_tensors(batch) for batch in group] for task, group in data.batches.items()}
    heads = {task: hash_tensors(head) for task, head in data.heads.items()} if "gradients" in needs else {}
    return {"batches": batches, "heads": heads}


def _merge_entries(merged: LazyMerge, advance: Callable[[int], None]) -> list[Entry]:
    source, dtype = merged.source, merged.dtype

    def stored(name: str) -> Tensor:
        advance(1)
        return merged.stored(name, dtype)

    return [Entry(name, dtype, source.shape(name), partial(stored, name)) for name in source.names]
