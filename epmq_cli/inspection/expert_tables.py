"""Prints the comparison of experts with their base, in tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.inspection.tables import amount, heading, line, prefix_line, refusals, show_parts, table
from epmq_cli.runtime.units import size

SHOWN = 5  # columns of a matrix of cosines


def show_experts(content: Mapping[str, Any]) -> None:
    """Prints the comparison."""
    count = len(content["experts"])
    heading(f"{count} expert{'s' if count > 1 else ''} of {content['base']}, family {content['family']}")
    if "models" in content:
        _models(content)
        show_parts(content)
        _configs(content["configs"])
    if content.get("task_vectors"):
        _task_vectors(content["task_vectors"], list(content["experts"]))
    refusals(content["refused"])
    if not content["refused"]:
        line("nothing that epmq inspect checks would be refused; epmq run --plan also checks data and options")


def _models(content: Mapping[str, Any]) -> None:
    rows = [
        (
            name,
            amount(own["parameters"]),
            " ".join(own["types"]),
            size(own["bytes"]),
            amount(content["heads_of_experts"].get(name, 0)),
            content["processors"].get(name, ""),
        )
        for name, own in content["models"].items()
    ]
    table(("model", "parameters", "types", "size", "head", "tokenizer or processor"), rows, left=(0, 2, 5))


def _configs(differences: Mapping[str, Mapping[str, Any]]) -> None:
    if not differences:
        line("configs: the same, but for classes, labels and versions")
    for key, values in differences.items():
        own = ", ".join(f"{name} {str(value)[:40]}" for name, value in values.items())
        line(f"configs differ in {key}: {own}")


def _task_vectors(content: Mapping[str, Any], tasks: list[str]) -> None:
    total = content["total"]
    shown = tasks[:SHOWN]
    rows = [
        (
            f"{index} {task}",
            f"{total['norms'][task]:.4g}",
            f"{100 * total['norms'][task] / (total['base_norm'] or 1):.2f}",
            f"{100 * total['outvoted'][task]:.1f}",
            *(f"{total['cosines'][task][other]:.3f}" for other in shown),
        )
        for index, task in enumerate(tasks, 1)
    ]
    names = [f"cos {index}" for index in range(1, len(shown) + 1)]
    table(("task vector", "norm", "% of base", "% outvoted", *names), rows, left=(0,))
    if len(tasks) > SHOWN:
        line(f"cosines with the first {SHOWN} of {len(tasks)} experts; --format json has all")
    trimmed, outvoted, conflicts = _mean(total["trimmed"]), _mean(total["outvoted"]), 100 * total["sign_conflicts"]
    line(
        f"TIES with merge.density={content['density']:g} trims {trimmed:.1f}% of the elements that an expert changes "
        f"and outvotes {outvoted:.1f}%, on average; {conflicts:.1f}% of the changed elements have task "
        "vectors of both signs"
    )
    common = prefix_line([own["block"] for own in content["blocks"] if "." in own["block"]])
    rows = [
        (
            own["block"].removeprefix(common),
            f"{sum(own['norms'].values()) / len(tasks):.3g}",
            f"{_cosine(own['cosines'], tasks):.3f}" if len(tasks) > 1 else "",
            f"{100 * own['sign_conflicts']:.1f}",
            f"{_mean(own['trimmed']):.1f}",
            f"{_mean(own['outvoted']):.1f}",
        )
        for own in content["blocks"]
    ]
    table(("block", "norm", "cosine", "% conflicts", "% trimmed", "% outvoted"), rows, left=(0,))


def _mean(shares: Mapping[str, float]) -> float:
    """The mean of shares, in %."""
    return 100 * sum(shares.values()) / len(shares)


def _cosine(cosines: Mapping[str, Mapping[str, float]], tasks: list[str]) -> float:
    """The mean cosine of two different task vectors."""
    values = [cosines[one][other] for one in tasks for other in tasks if one != other]
    return sum(values) / len(values)
