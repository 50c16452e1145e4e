"""Turns the config of a run into checked objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from omegaconf import DictConfig

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.checkpoint.engines import check_engine
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.checkpoint.open_clip import check_family
from epmq_cli.config import instantiate, schema
from epmq_cli.config.validate import check_choice, check_keys
from epmq_cli.data.suite import Suite
from epmq_cli.errors import ConfigError
from epmq_cli.families import suite_family
from epmq_cli.families.family import Family
from epmq_cli.merge.method import MergeMethod, check_method
from epmq_cli.pipeline.budget import loadable
from epmq_cli.pipeline.option_checks import (
    check_block_refinement,
    check_generation,
    check_gradients,
    check_kv_cache,
    check_no_server,
    check_prompts,
    check_refinement,
    check_scoring,
    check_slices,
    check_targets,
    check_transform,
)
from epmq_cli.quantize.build import build_quantizer, kv_cache_of
from epmq_cli.quantize.mixed_precision import MixedPrecision, formats_of
from epmq_cli.quantize.quantizer import Quantizer
from epmq_cli.refine.blocks import Blocks
from epmq_cli.refine.both import Both
from epmq_cli.refine.distill import Distill
from epmq_cli.refine.none import NoRefinement
from epmq_cli.runtime.products import exact_products


@dataclass(frozen=True)
class Job:
    """The objects that a run's config describes. Every value is checked."""

    suite: Suite
    family: Family
    merge: MergeMethod
    guidance: Guidance
    refine: Distill | NoRefinement
    """The refinement of the dense model."""
    blocks: Blocks | None
    """The refinement of the quantized blocks."""
    calib: schema.Calib
    quantizer: Quantizer | MixedPrecision
    kv_cache: str | None
    """The format of cached keys and values whose scales the checkpoint stores; None for no scales."""
    exporter: Exporter
    evaluation: schema.Evaluation
    transform: str
    device_name: str
    seed: int
    resume: str

    @cached_property
    def device(self) -> torch.device:
        """The device; ConfigError if the machine does not have it."""
        return instantiate.device_of(self.device_name)


def make_job(cfg: DictConfig) -> Job:
    """Builds the job of a complete config. Raises ConfigError before any model is opened."""
    job = read_job(cfg)
    check_device(job)
    return job


def check_device(job: Job) -> None:
    """Prepares the device. Raises ConfigError if the machine does not have it."""
    exact_products(job.device)


def read_job(cfg: DictConfig) -> Job:
    """The job of a complete config, whose device is not checked yet. Raises ConfigError before any model is opened, and
    before torch is imported."""
    suite: Suite = instantiate.build("suite", cfg.suite)
    guidance: Guidance = instantiate.build("guidance", cfg.guidance)
    names = [task.name for task in suite.members]
    check_keys("guidance.weights", guidance.weights or {}, names)
    family, evaluation = suite_family(suite), instantiate.build("eval", cfg.eval)
    check_scoring(suite, family, evaluation, schema.scores_samples(evaluation))
    check_no_server(evaluation)
    merge: MergeMethod = instantiate.build("merge", cfg.merge)
    check_method(merge, names)
    check_slices(merge, guidance)
    if suite.tokenizer is not None:
        raise ConfigError(
            "suite.tokenizer makes a new vocabulary, which epmq run does not do; merge with epmq merge, then give the "
            "result to epmq run as suite.base"
        )
    check_gradients(merge, family)
    if not any(guidance.factor(name) for name in names):
        raise ConfigError("guidance.weights must leave at least one task above 0, got 0 for every task")
    check_choice("resume", cfg.resume, ("auto", "never"))
    check_transform(cfg.transform, merge)
    calib: schema.Calib = instantiate.build("calib", cfg.calib)
    check_generation(calib, family)
    check_prompts(guidance, calib, family)
    instantiate.check_device(cfg.device)
    refine, blocks = _refinements(instantiate.build("refine", cfg.refine))
    budget = None if cfg.budget is None else schema.bytes_of("budget", cfg.budget)
    quantizer = build_quantizer(cfg.quant, budget)
    check_targets(quantizer, guidance)
    check_refinement(refine, merge, calib, formats_of(quantizer))
    if blocks is not None:
        check_block_refinement(quantizer)
    exporter: Exporter = instantiate.build("pack", cfg.pack)
    quantizer = loadable(quantizer, exporter, family)
    exporter.check(family, formats_of(quantizer))
    check_engine(exporter, family, formats_of(quantizer))
    check_kv_cache(kv_cache_of(cfg.quant), family, exporter, formats_of(quantizer))
    if exporter.open_clip:
        check_family(family, suite.family)
    return Job(
        suite=suite,
        family=family,
        merge=merge,
        guidance=guidance,
        refine=refine,
        blocks=blocks,
        calib=calib,
        quantizer=quantizer,
        kv_cache=kv_cache_of(cfg.quant),
        exporter=exporter,
        evaluation=evaluation,
        transform=cfg.transform,
        device_name=cfg.device,
        seed=instantiate.seed_of(cfg.seed),
        resume=cfg.resume,
    )


def _refinements(chosen: Distill | Blocks | Both | NoRefinement) -> tuple[Distill | NoRefinement, Blocks | None]:
    """The refinement of the dense model and that of the quantized blocks."""
    if isinstance(chosen, Both):
        return chosen.distill, chosen.blocks
    return (NoRefinement(), chosen) if isinstance(chosen, Blocks) else (chosen, None)
