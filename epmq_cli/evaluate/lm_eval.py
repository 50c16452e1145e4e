"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), through its Python API."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.errors import ConfigError
from epmq_cli.models.pretrained import from_folder

PREFERRED = ("acc_norm", "exact_match", "acc", "f1", "mcc")
"""The metrics to report for a task that has several; without any of these, its first one. Where the harness computes a
metric through several filters, the first filter of the task counts (strict-match for gsm8k)."""


def harness_scores(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    tasks: Sequence[str],
    include_path: str | None,
    shots: int | None,
    limit: int | None,
    micro: MicroBatcher,
) -> dict[str, float]:
    """The score of each task or group under the name `<task>/<metric>`; patterns (arc_*), tags (ai2_arc) and groups
    without a score of their own stand for their tasks.

    `folder` has the tokenizer. `include_path`: a folder with task files of the user. `shots`: examples in the prompt,
    None for each task's own number. `limit`: the most samples of each task. Needs the extra `lm_eval`; ConfigError
    where it is missing or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            "eval=lm_eval needs lm-evaluation-harness; install it with pip install 'epmq-cli[lm_eval]'"
        ) from error
    from transformers import AutoTokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _known(include_path)
    matched = {task: manager.match_tasks([task]) for task in tasks}  # simple_evaluate takes no patterns
    unknown = [task for task, names in matched.items() if not names]
    if unknown:
        raise ConfigError(
            f"eval.tasks names {unknown[0]}, which lm-evaluation-harness does not know; `lm-eval ls tasks` lists its "
            "tasks, and eval.include_path names a folder of your own"
        )
    tokenizer = from_folder(AutoTokenizer, folder)

    def evaluated(name: str, samples: int) -> Any:
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, device=str(device), batch_size=samples),
            tasks=[name],
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            batch_size=samples,
            bootstrap_iters=0,
            log_samples=False,
        )

    scores: dict[str, float] = {}
    named = dict.fromkeys(name for names in matched.values() for name in names)
    for name in named:  # one by one, as the results do not say which tasks a tag stood for
        found = micro.run(partial(evaluated, name))
        results = {**found["results"], **found.get("groups", {})}
        scores |= chosen([name] if numbers(results.get(name, {})) else list(found["configs"]), results)
    return scores


@lru_cache(maxsize=1)
def _known(include_path: str | None) -> Any:
    """The task manager of the harness, which takes seconds to build, with the user's own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def chosen(tasks: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The preferred metric of each task; `results` from the harness, with keys such as "acc_norm,none"."""
    scores = {}
    for task in tasks:
        found = numbers(results[task])
        metric = next((name for name in PREFERRED if name in found), next(iter(found)))
        scores[f"{task}/{metric}"] = found[metric]
    return scores


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one task by name without the filter, in the task's order."""
    found: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and "stderr" not in metric and isinstance(value, int | float):
            found.setdefault(metric, float(value))
    return found
