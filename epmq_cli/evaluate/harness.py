"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), through its Python API."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq_cli.errors import ConfigError

PREFERRED = ("acc_norm", "exact_match", "acc", "f1", "mcc")
"""The metric that is reported of a task that has several; otherwise its first one."""


def harness_scores(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    tasks: Sequence[str],
    include_path: str | None,
    shots: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, float]:
    """The score of each task or group under the name `<task>/<metric>`.

    `folder` has the tokenizer. `include_path`: a folder of the user's own task files. `shots`: examples in the prompt,
    None for each task's own number. `limit`: at most so many samples of each. Needs the extra `lm_eval`; ConfigError
    where it is missing or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "eval=lm_eval needs lm-evaluation-harness; install it with pip install 'epmq-cli[lm_eval]'"
        ) from error
    from transformers import AutoTokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"eval.tasks names {unknown[0]}, which lm-evaluation-harness does not know; `lm-eval ls tasks` lists its "
            "tasks, and eval.include_path names a folder of your own"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, device=str(device), batch_size=batch_size)
    found: Any = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        batch_size=batch_size,
        bootstrap_iters=0,
        log_samples=False,
    )
    return chosen(tasks, {**found["results"], **found.get("groups", {})})


def chosen(tasks: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The preferred metric of each task; `results` as the harness gives them, with keys such as "acc_norm,none"."""
    scores = {}
    for task in tasks:
        numbers = {
            key.split(",")[0]: float(value)
            for key, value in results[task].items()
            if "," in key and "stderr" not in key and isinstance(value, int | float)
        }
        metric = next((name for name in PREFERRED if name in numbers), next(iter(numbers)))
        scores[f"{task}/{metric}"] = numbers[metric]
    return scores
