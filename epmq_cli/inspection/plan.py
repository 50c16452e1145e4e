"""`epmq run --plan`: what a run would merge, quantize, leave and refuse, and what it takes; as JSON and in tables."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from epmq_cli.inspection.content import roles_content
from epmq_cli.inspection.estimate import estimates
from epmq_cli.inspection.planned import Planned, planned
from epmq_cli.inspection.roles import roles_by_family
from epmq_cli.inspection.tables import heading, line, refusals, show_parts, table
from epmq_cli.runtime.units import duration, size


def plan_content(cfg: DictConfig) -> dict[str, Any]:
    """The plan of the run of a config. Nothing is calibrated, and no weights are downloaded."""
    plan = planned(cfg)
    content: dict[str, Any] = {"suite": str(cfg.suite.get("name")), "bits": cfg.bits, "device": str(cfg.device)}
    content |= {} if cfg.budget is None else {"budget": str(cfg.budget)}
    job = plan.job
    if job is not None and plan.base is not None and plan.source is not None and plan.model is not None:
        content |= {"family": job.family.name, "device": str(job.device), **_roles(plan)}
        model = plan.model
        content["estimate"] = plan.attempt(lambda: estimates(plan, job, model))
    return content | {"notes": plan.notes, "refused": plan.refused}


def _roles(plan: Planned) -> dict[str, Any]:
    assert plan.job is not None and plan.base is not None and plan.source is not None
    base, family, source = plan.base, plan.job.family, plan.source
    merged = {name: source.read_name(name) for name in source.names}
    return roles_content(base.infos, roles_by_family(family, base, merged))


def show_plan(content: dict[str, Any]) -> None:
    """Prints a plan."""
    width = f"within {content['budget']}" if "budget" in content else f"at {content['bits']} bits"
    heading(f"plan of {content['suite']} {width} on {content['device']}; nothing is calibrated")
    if "parts" in content:
        show_parts(content)
    if content.get("estimate"):
        _estimate(content["estimate"])
    for note in content["notes"]:
        line(f"note: {note}")
    refusals(content["refused"])
    if not content["refused"]:
        line("nothing here refuses the run; the run itself also checks the test data, and the blocks of the model")


def _estimate(content: dict[str, Any]) -> None:
    memory, disk, seconds = content["memory"], content["disk"], content["seconds"]
    rows = [("memory", name, size(count)) for name, count in memory.items() if count]
    rows += [("disk", name, size(count)) for name, count in disk.items() if count]
    total = content["total_seconds"]
    rows += [("time", name, duration(value)) for name, value in seconds.items() if value > total / 50]
    table(("", "part", "about"), [*rows, ("time", "all stages", duration(total))], left=(0, 1))
    if budget := content.get("budget"):
        low, high = size(budget["smallest"]), size(budget["largest"])
        line(f"budget: the weight files can take {low} to {high}; the run chooses by the losses that it measures")
    own = content["measured"]
    rows_, width, outs = own["product"]
    line(
        f"time: {content['calibration_tokens']} calibration and {content['test_tokens']} test tokens in operations, "
        f"divided by what this machine just did: {own['product_gflops']:g} GFLOPS in a product of {rows_} x {width} x "
        f"{outs}, {own['cholesky_gflops']:g} in a Cholesky; decoding and tokenizing are not in it. Memory: the "
        "process as it is now, the float32 model, the pages of the weight files (which the system can take back), and "
        "the largest of calibration, scoring and training"
    )
