"""The numbers of one metrics.json that tables and pages show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from epmq_cli.evaluate.metrics import PERPLEXITY

RESULT, MERGED, EXPERTS, BASE = "quantized", "merged", "experts", "base"
PLAIN = "plain GPTQ"
"""The result of another run, which quantizes the same merge without guidance."""
STAGES = (BASE, MERGED, PLAIN, RESULT, EXPERTS)
"""The stages in the order in which readers compare them."""
LOWER_IS_BETTER = (PERPLEXITY, "wer")
NOT_SHARES = (PERPLEXITY,)
"""Metrics that are not shown in %."""


def shown(score: float | None, metric: str) -> str:
    """A score as text: in % with one decimal, perplexities unscaled; empty without a score."""
    if score is None:
        return ""
    return f"{score:.2f}" if metric in NOT_SHARES else f"{100 * score:.1f}"


def closed_gap(scores: Mapping[str, float], metric: str) -> float | None:
    """The share of the gap between the dense merge and the experts that the result closes; of perplexities, on a
    logarithmic scale. None if a score is missing or the experts are not better than the merge."""
    if not {MERGED, EXPERTS, RESULT} <= scores.keys():
        return None
    merged, experts, result = (_rising(scores[stage], metric) for stage in (MERGED, EXPERTS, RESULT))
    return (result - merged) / (experts - merged) if experts > merged else None


def _rising(score: float, metric: str) -> float:
    """The score on a scale on which larger is better."""
    if metric == PERPLEXITY:
        return -math.log(score)
    return -score if metric in LOWER_IS_BETTER else score


def metric_of_average(content: Mapping[str, Any]) -> str:
    """The metric that the averages are shown in; empty without scores."""
    return next(iter(scores_of(content)["metrics"].values()), "")


def scores_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores; those of `epmq merge` and of `eval.stages=[]` are empty."""
    empty: dict[str, Any] = {"metrics": {}, "tasks": {}, "average": {}}
    return content.get("scores") or empty


def megabytes(content: Mapping[str, Any]) -> float | None:
    """The size of the stored weights in MB (1e6 bytes)."""
    count = content.get("bytes", {}).get("model_packed")
    return None if count is None else count / 1e6


def seconds(content: Mapping[str, Any]) -> float:
    """The wall time of all stages."""
    return float(sum(stage["seconds"] for stage in content["stages"].values()))
