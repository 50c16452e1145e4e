"""Prints the comparison of experts with their base, in tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.inspection import sentences
from epmq_cli.inspection.rows import block_rows, model_rows, vector_rows
from epmq_cli.inspection.tables import heading, line, lines, prefix_line, refusals, show_parts, table

SHOWN = 3  # columns of a matrix of cosines


def show_experts(content: Mapping[str, Any]) -> None:
    """Prints the comparison."""
    heading(f"{sentences.experts(content)}, family {content['family']}")
    if "models" in content:
        table(*model_rows(content))
        show_parts(content)
        lines(sentences.configs(content["configs"]))
    if content.get("task_vectors"):
        _task_vectors(content["task_vectors"], list(content["experts"]))
    refusals(content["refused"])
    if not content["refused"]:
        line(sentences.ALLOWED)


def _task_vectors(content: Mapping[str, Any], tasks: list[str]) -> None:
    table(*vector_rows(content, tasks[:SHOWN]))
    if len(tasks) > SHOWN:
        line(f"cosines with the first {SHOWN} of {len(tasks)} experts; --html and --format json have all")
    line(sentences.ties(content))
    prefix = prefix_line([own["block"] for own in content["blocks"]])
    table(*block_rows(content, prefix))
