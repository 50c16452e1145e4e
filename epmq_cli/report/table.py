"""The summary that a command prints at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from epmq_cli.evaluate.metrics import PERPLEXITY
from epmq_cli.runtime.console import console, log
from epmq_cli.runtime.units import duration, size
from epmq_cli.store.run_lock import REPORT


def counted(number: int, noun: str) -> str:
    """The number with the noun in singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def score_table(scores: Mapping[str, Any]) -> Table:
    """One row for each task, the mean and its standard error, one column for each stage; in % except perplexities."""
    stages, metrics = list(scores["average"]), scores["metrics"]
    kinds = set(metrics.values())
    one = len(kinds) == 1
    render = _perplexity if PERPLEXITY in kinds else _percent
    table = Table()
    table.add_column(("".join(kinds) if one else "score") + (" in %" if render is _percent else ""))
    for stage in stages:
        table.add_column(stage, justify="right")
    for task, by_stage in scores["tasks"].items():
        name = task if one else f"{task} ({metrics[task]})"
        table.add_row(name, *(render(by_stage.get(stage)) for stage in stages))
    table.add_section()
    table.add_row("average", *(render(scores["average"][stage]) for stage in stages), style="bold")
    if errors := scores["standard_errors"]["average"]:
        table.add_row("standard error", *(render(errors.get(stage)) for stage in stages), style="dim")
    return table


COMPARED = "merged -> quantized, on test samples without labels"


def agreement_lines(agreement: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """What the comparison with the experts says, as means over the tasks."""
    means = {}
    for part in ("kl", "top1", "cosine"):
        for stage in ("merged", "quantized"):
            values = [stages[stage][part] for stages in agreement.values() if part in stages.get(stage, {})]
            means[part, stage] = sum(values) / len(values) if values else None
    cosines = means["cosine", "merged"], means["cosine", "quantized"]
    if None not in cosines:
        return [f"to experts  cosine {cosines[0]:.4f} -> {cosines[1]:.4f} ({COMPARED})"]
    before, after = means["kl", "merged"], means["kl", "quantized"]
    if before is None or after is None:
        return []
    shares = [means["top1", stage] for stage in ("merged", "quantized")]
    same = "" if None in shares else f", same answers {100 * shares[0]:.1f} -> {100 * shares[1]:.1f}%"  # type: ignore[operator]
    lines = [f"to experts  KL {before:.4g} -> {after:.4g}{same} ({COMPARED})"]
    if after > before:
        lines.append("            the quantized model is further from the experts than the merge")
    return lines


TROUBLE = {
    "damping_retried": "needed more damping",
    "target_without_factor": "kept the merged weight as target",
    "fallbacks": "were rounded to nearest",
    "unrouted": "got no calibration token",
}
"""Texts for the events in metrics.json."""
HALVED = {"batches_halved": "calibration", "eval_batches_halved": "scoring"}
"""Texts for the events that count halvings."""


def show_run(measured: Mapping[str, Any], title: str, folder: Path) -> None:
    """Prints scores, sizes, times and the paths of the results."""
    _line(title)
    if measured["scores"]["tasks"]:
        console.print(score_table(measured["scores"]))
    sizes, events, guidance, bits = (measured[part] for part in ("bytes", "events", "guidance", "average_bits"))
    if guidance["chosen"]:
        values = ", ".join(f"{name} {guidance[name]:g}" for name in guidance["chosen"])
        _line(f"chosen      {values}, of {len(guidance['trials'])} tried without labels")
    if measured.get("agreement"):
        for line in agreement_lines(measured["agreement"]):
            _line(line)
    ratio = sizes["linears_dense"] / sizes["linears_packed"]
    whole = f"{size(sizes['model_dense'])} -> {size(sizes['model_packed'])}"
    mixed = "" if bits is None or bits == round(bits) else f" at {bits:.2f} bits on average"
    _line(f"weights     {whole}, calibrated linears {ratio:.1f} times smaller{mixed}")
    _line(f"time        {_times(measured['stages'])}")
    if measured["cache"] and measured["cache"]["found"]:
        reused = counted(measured["cache"]["found"], "result")
        _line(f"cache       reused {reused} of earlier runs; cache=false recomputes them")
    counts = [f"{events[name]} {text}" for name, text in TROUBLE.items() if events[name]]
    if counts:
        _line(f"trouble     of {events['linears']} linears {', '.join(counts)}; see layers in metrics.json")
    halved = [f"{name} {events[key]} times" for key, name in HALVED.items() if events[key]]
    if halved:
        _line(f"memory      ran out: the micro-batch was halved in {' and in '.join(halved)}")
    _line(f"checkpoint  {near(folder / 'checkpoint')}")
    _line(f"metrics     {near(folder / 'metrics.json')}")
    if (folder / REPORT).is_file():
        _line(f"report      {near(folder / REPORT)}")


def show_eval(measured: Mapping[str, Any], title: str, folder: Path) -> None:
    """Prints scores, times and the paths of the results."""
    _line(title)
    console.print(score_table(measured["scores"]))
    _line(f"time        {_times(measured['stages'])}")
    _line(f"metrics     {near(folder / 'metrics.json')}")


def show_merge(measured: Mapping[str, Any], folder: Path) -> None:
    """Prints size, times and the paths of the results."""
    _line(f"weights     {size(measured['bytes']['model_dense'])}")
    _line(f"time        {_times(measured['stages'])}")
    _line(f"checkpoint  {near(folder / 'checkpoint')}")
    _line(f"metrics     {near(folder / 'metrics.json')}")


def near(path: Path) -> Path:
    """The path relative to the working folder, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _line(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    log.info(text)


def _times(stages: Mapping[str, Mapping[str, float]]) -> str:
    total = sum(record["seconds"] for record in stages.values())
    long = [f"{name} {duration(own['seconds'])}" for name, own in stages.items() if own["seconds"] > total / 20]
    return f"{duration(total)}: {', '.join(long)}"


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _perplexity(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"
