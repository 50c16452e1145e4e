"""The title and the sentence at the top of a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epmq_cli.report import numbers
from epmq_cli.report.settings import choices
from epmq_cli.report.table import counted
from epmq_cli.runtime.units import size

PREPOSITIONS = {"run": "", "eval": "scores of ", "merge": "merge of "}


def title(content: Mapping[str, Any]) -> str:
    """What was made, in a few words."""
    chosen = choices(content["config"])
    names = [chosen[group] for group in ("merge", "guidance", "quant") if group in chosen]
    return ": ".join(part for part in (chosen.get("suite", f"epmq {content['command']}"), ", ".join(names)) if part)


def sentence(content: Mapping[str, Any]) -> str:
    """What was merged, how, with how many bits; the score against the merge and the experts; the size."""
    parts = [_made(content), *_scores(content)]
    sizes = content.get("bytes", {})
    packed, dense = sizes.get("model_packed"), sizes.get("model_dense")
    if packed is not None and dense is not None:
        parts.append(f"its weights take {size(packed)} in place of {size(dense)}")
    elif dense is not None:
        parts.append(f"its weights take {size(dense)}")
    return "; ".join(parts) + "."


def _made(content: Mapping[str, Any]) -> str:
    config, chosen = content["config"], choices(content["config"])
    tasks = (config.get("suite") or {}).get("tasks") or {}
    what = (
        f"{counted(len(tasks), 'expert')} of {chosen['suite']}" if "suite" in chosen else str(config.get("checkpoint"))
    )
    if "merge" not in chosen:
        return f"Scores of {what}"
    how = f"merged with {chosen['merge']}"
    bits = content.get("average_bits")
    if bits is None:
        return f"{what} {how}" + (f", with {chosen['guidance']} guidance, unquantized" if "guidance" in chosen else "")
    return f"{what} {how} and quantized to {bits:.3g} bits with {chosen['quant']} and {chosen['guidance']} guidance"


def _scores(content: Mapping[str, Any]) -> list[str]:
    scores, metric = numbers.scores_of(content), numbers.metric_of_average(content)
    average = scores["average"]
    if numbers.RESULT not in average:
        return []
    kinds = set(scores["metrics"].values())
    kind, unit = (metric if len(kinds) == 1 else "score"), ("" if metric in numbers.NOT_SHARES else "%")
    mean = "average " if len(scores["tasks"]) > 1 else ""
    own = f"{mean}{kind} {numbers.shown(average[numbers.RESULT], metric)}{unit}"
    others = [
        f"{numbers.shown(average[stage], metric)}{unit} for {name}"
        for stage, name in ((numbers.MERGED, "the dense merge"), (numbers.EXPERTS, "the experts"))
        if stage in average
    ]
    closed = numbers.closed_gap(average, metric)
    against = f" against {' and '.join(others)}" if others else ""
    return [own + against + (f", so {100 * closed:.0f}% of the gap is closed" if closed is not None else "")]
