"""Finds the run that quantizes the same merge with plain GPTQ, which shows what guidance and refinement add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epmq_cli.report.numbers import PLAIN, RESULT, scores_of
from epmq_cli.report.run_folders import Run
from epmq_cli.report.settings import choices

PLAIN_OPTIONS = {"guidance": "merged", "refine": "none", "quant": "gptq"}
"""The options of plain GPTQ."""
SHARED = ("suite", "merge", "bits", "group_size")


def with_plain(content: Mapping[str, Any], runs: Sequence[Run]) -> Mapping[str, Any]:
    """The content of a run, with the stage `PLAIN` in its scores if one of the runs is its plain counterpart."""
    plain = plain_of(content, runs)
    if plain is None:
        return content
    scores = content["scores"]
    tasks = {task: own | {PLAIN: plain["tasks"][task][RESULT]} for task, own in scores["tasks"].items()}
    average = scores["average"] | {PLAIN: plain["average"][RESULT]}
    return {**content, "scores": {**scores, "tasks": tasks, "average": average}}


def plain_of(content: Mapping[str, Any], runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """The scores of the run that quantizes the same merge with plain GPTQ, without guidance and refinement: of the same
    suite, bits, groups and test samples. Of several the one with the most options in common; None without one."""
    if _is_plain(content) or not scores_of(content)["tasks"]:
        return None
    known = [run.content for run in runs if _is_plain(run.content) and _compared(run.content) == _compared(content)]
    config: Mapping[str, Any] = content["config"]
    nearest = max(known, key=lambda other: _common(other["config"], config), default=None)
    return None if nearest is None else scores_of(nearest)


def _is_plain(content: Mapping[str, Any]) -> bool:
    chosen = choices(content["config"])
    fits = all(chosen.get(group) == option for group, option in PLAIN_OPTIONS.items())
    return fits and RESULT in scores_of(content)["average"]


def _compared(content: Mapping[str, Any]) -> list[Any]:
    scores = scores_of(content)
    return [*(content["config"].get(key) for key in SHARED), scores["metrics"], scores.get("samples")]


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(one.get(key) == value for key, value in other.items())
