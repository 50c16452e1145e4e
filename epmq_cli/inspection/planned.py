"""What `epmq run --plan` knows of a run: its models without their weights, its samples, and what would be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import nn

from epmq_cli.checkpoint.engine import Base
from epmq_cli.checkpoint.engines import check_engine_model
from epmq_cli.checkpoint.open_clip import check_base
from epmq_cli.config import instantiate
from epmq_cli.config.schema import GENERATE, scores_samples
from epmq_cli.data.batching import Batch
from epmq_cli.errors import EpmqError, ModelError
from epmq_cli.families import AUTO, claiming
from epmq_cli.families.family import linear_shapes
from epmq_cli.families.sound_features import STRIDE
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.inspection.roles import HeaderTensors
from epmq_cli.inspection.skeleton import skeleton
from epmq_cli.merge.given import given_path
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.slices import sliced
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.suite_models import SuiteModels, written_dtype
from epmq_cli.models.hub_headers import hub_headers, on_this_machine
from epmq_cli.models.lora.config import CONFIG
from epmq_cli.models.lora.folder import is_adapter_file
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_files import ProcessorFiles
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.budget import check_budget
from epmq_cli.pipeline.job import Job, make_job
from epmq_cli.pipeline.preflight import (
    check_described,
    check_groups,
    check_kernel,
    check_lengths,
    check_parts,
)
from epmq_cli.pipeline.scored_tasks import evaluation_samples
from epmq_cli.quantize.mixed_precision import formats_of

Result = TypeVar("Result")
META = torch.device("meta")
IMAGE, PATCH = 224, 16


@dataclass
class Planned:
    """The parts of a run that could be opened. `refused`: the sentences of the run; `notes`: what was not checked.

    `source`: base and experts by their headers. `model`: on the meta device. `batches`: the calibration batches of each
    task. `tests`: the number of its test samples, or of its tokens for perplexity.
    """

    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    job: Job | None = None
    base: ModelFolder | None = None
    experts: Mapping[str, ModelFolder] = field(default_factory=dict)
    source: MergeSource | None = None
    model: nn.Module | None = None
    dtype: torch.dtype = torch.float32
    batches: dict[str, list[Batch]] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)
    sample_seconds: float = 0.0
    """The processor time of reading a calibration sample and making its part of a batch."""

    def attempt(self, call: Callable[[], Result]) -> Result | None:
        """The result of a check; None if it refuses, and then its sentence is kept."""
        try:
            return call()
        except EpmqError as error:
            if str(error) not in self.refused:
                self.refused.append(str(error))
            return None


def planned(cfg: DictConfig) -> Planned:
    """The run of a config: opens models by their headers, and draws the calibration samples if they are on this
    machine. Downloads nothing but headers."""
    plan = Planned()
    if plan.attempt(lambda: _check_complete(cfg)) is None:
        return plan
    remote = plan.attempt(lambda: _remote(cfg))
    plan.job = None if remote is None else plan.attempt(lambda: make_job(cfg))
    if plan.job is None or remote is None:
        return plan
    job = plan.job
    if remote:
        plan.notes.append(
            f"{', '.join(sorted(remote))} not on this machine: planned from the headers on the hub; tokenizers, tied "
            "tables and data are checked by the run"
        )
        plan.attempt(lambda: _open_remote(plan, job))
    else:
        plan.attempt(lambda: _open_local(plan, job))
    if plan.model is not None:
        _check_model(plan, job, plan.model, bool(remote))
        _draw(plan, job, bool(remote))
    return plan


def _check_complete(cfg: DictConfig) -> bool:
    instantiate.check_complete(cfg, "run")
    return True


def _remote(cfg: DictConfig) -> set[str]:
    """The roles whose models only the hub has. Replaces suite.family=auto if the base is one of them."""
    suite: Any = instantiate.build("suite", cfg.suite)
    sources = {"base": suite.base, **{f"expert of task {task.name}": task.expert for task in suite.members}}
    parts = [(role, part) for role, source in sources.items() for part in _parts(source)]
    missing = {role for role, part in parts if not isinstance(on_this_machine(part, role, suite.root), Path)}
    if "base" in missing and suite.family == AUTO:
        cfg.suite.family = claiming(_headers(suite.base, "base", suite.root, None).config).name
    return missing


def _parts(source: str) -> list[str]:
    """A model and its adapter, if they are given as one source."""
    return [source] if Path(source).exists() or "+" not in source else source.split("+", 1)


ADAPTER = "{role}: {source} is an adapter; give the model that the adapter was trained on"


class _AdapterError(ModelError):
    """Raised for an adapter, whose tensors are not those of its model."""


def _headers(source: str, role: str, root: str | None, base: ModelFolder | None) -> ModelFolder:
    """A model by its headers. Raises _AdapterError for an adapter."""
    found = on_this_machine(source, role, root)
    if "+" in source or (isinstance(found, Path) and ((found / CONFIG).is_file() or is_adapter_file(found))):
        raise _AdapterError(ADAPTER.format(role=role, source=source))
    if isinstance(found, Path):
        return ModelFolder(found, role, base.config if base is not None and found.is_file() else None)
    config, infos = hub_headers(found["repo"], found["revision"], role)
    if any(part.startswith("lora_") for name in infos for part in name.split(".")):
        raise _AdapterError(ADAPTER.format(role=role, source=source))
    own = config if config or base is None else base.config
    return ModelFolder(Path(source), role, own, HeaderTensors(infos, role))


def _open_local(plan: Planned, job: Job) -> None:
    """Opens models as the run does, but for the weights of the base."""
    models = SuiteModels(job.suite, job.family, given=given_path(job.merge), transform=job.transform)
    plan.base, plan.experts, plan.source = models.base, models.experts, models.source
    if job.exporter.open_clip:
        plan.attempt(lambda: check_base(models.base))
    plan.attempt(lambda: ProcessorFiles(models.base.path))
    plan.dtype = written_dtype(models.source, job.exporter.dtype)
    plan.attempt(lambda: check_lengths(job.suite, job.family, models.base.path))
    plan.model = plan.attempt(lambda: job.family.load(models.base.path, weights=False))
    if plan.model is not None:
        model = plan.model
        plan.attempt(lambda: check_described(model, job.family, models))


def _open_remote(plan: Planned, job: Job) -> None:
    """Opens models by their headers, on this machine or on the hub."""
    suite, family = job.suite, job.family
    base = _headers(suite.base, "base", suite.root, None)
    folders = dict[str, ModelFolder]()
    for task in suite.members:
        try:
            folder = _headers(task.expert, f"expert of task {task.name}", suite.root, base)
        except _AdapterError:
            plan.notes.append(f"the expert of task {task.name} is an adapter, which the run compares with the base")
        else:
            folders[task.name] = folder
    named = {task: NamedTensors(folder, family.tensor_names(folder)) for task, folder in folders.items()}
    source = MergeSource(NamedTensors(base, family.tensor_names(base)), named, suite.vocabulary)
    plan.base, plan.experts, plan.source = base, folders, source
    plan.dtype = written_dtype(source, job.exporter.dtype)
    shapes = {name: base.infos[stored].shape for name, stored in family.all_names(base).items()}
    model = skeleton(shapes, base.config)
    try:
        family.blocks(model)
    except ModelError as error:  # modules without tensors, such as the norms of OLMo, are not in a header
        plan.notes.append(f"no estimate from the headers alone: {error}")
    else:
        plan.model = model


def _check_model(plan: Planned, job: Job, model: nn.Module, remote: bool) -> None:
    """The checks of the run that need the shapes of the model; those of the tokenizer too unless it is remote."""
    formats = formats_of(job.quantizer)
    refused = len(plan.refused)
    plan.attempt(lambda: check_parts(model, job.family))
    if len(plan.refused) > refused:
        plan.model = None
        return
    plan.attempt(lambda: check_groups(model, job.family, formats))
    linears = dict(linear_shapes(model, job.family))
    plan.attempt(lambda: job.exporter.check_linears(linears, model, formats))
    if plan.base is not None:
        base = Base(plan.base.config, None if remote else plan.base.path)
        plan.attempt(lambda: check_engine_model(job.exporter, job.family, linears, formats, base))
    packed = formats if job.exporter.packs else []
    if not sliced(job.merge):
        plan.attempt(lambda: check_budget(job, model, plan.dtype))
    plan.attempt(lambda: check_kernel(model, job.family, packed, job.evaluation, job.device))


def _draw(plan: Planned, job: Job, remote: bool) -> None:
    """Draws the calibration samples and counts the test samples, or takes the largest ones that are possible."""
    assert plan.base is not None
    base = plan.base.path
    generated = job.calib.source == GENERATE
    if remote or generated or not all(_on_disk(task.data) for task in job.suite.members):
        if not remote and not generated:
            plan.notes.append("the data is on the hub and is not read; lengths are the longest that the config allows")
        plan.batches = {task.name: _longest(plan, job, task.max_length) for task in job.suite.members}
        plan.tests = dict.fromkeys(plan.batches, job.evaluation.samples or 0)
        if job.evaluation.samples is None and scores_samples(job.evaluation):
            plan.notes.append("the number of test samples is not known, so the time leaves scoring out")
        return
    start = time.process_time()
    drawn = plan.attempt(lambda: steps.calibration_batches(job, base))
    plan.batches = drawn or {task.name: _longest(plan, job, task.max_length) for task in job.suite.members}
    if drawn:
        count = sum(len(next(iter(batch.values()))) for group in drawn.values() for batch in group)
        plan.sample_seconds = (time.process_time() - start) / count
    for task in job.suite.members if scores_samples(job.evaluation) else ():
        samples = plan.attempt(lambda task=task: evaluation_samples(task, job.evaluation.samples, job.seed))  # type: ignore[misc]
        if samples is None:
            continue
        language = job.family.tasks
        plan.tests[task.name] = len(samples)
        if isinstance(language, LanguageModel):
            overlap = task.max_length / (task.stride or task.max_length)
            ids = plan.attempt(partial(language.scored, base, task, samples.inputs))
            plan.tests[task.name] = 0 if ids is None else round(overlap * len(ids))


def _on_disk(data: Any) -> bool:
    """Whether the samples of a source are on this machine."""
    if not getattr(data, "streams", False):
        return True
    places = [data.path, *([f"{data.root}/datasets/{data.path}", f"{data.root}/{data.path}"] if data.root else [])]
    return any(Path(place).is_dir() for place in places)


def _longest(plan: Planned, job: Job, length: int) -> list[Batch]:
    """Calibration batches of the longest samples, without values."""
    assert plan.base is not None
    count, size = job.calib.samples, job.calib.batch_size
    sizes = [min(size, count - start) for start in range(0, count, size)]
    if job.family.reads == "pictures":
        own = plan.base.config.get("vision_config") or plan.base.config
        side = own.get("image_size", IMAGE) if isinstance(own, dict) else IMAGE
        return [{"pixel_values": torch.empty(n, 3, side, side, device=META)} for n in sizes]
    if job.family.reads == "sounds":
        bins, places = (int(plan.base.config.get(name) or 0) for name in ("num_mel_bins", "max_source_positions"))
        return [{"input_features": torch.empty(n, bins, STRIDE * places, device=META)} for n in sizes]
    return [{"input_ids": torch.empty(n, length, dtype=torch.int64, device=META)} for n in sizes]
