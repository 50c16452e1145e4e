"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), through its Python API."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from epmq_cli.config.schema import Harness
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.errors import ConfigError
from epmq_cli.evaluate.metrics import Score
from epmq_cli.evaluate.standard_errors import binomial
from epmq_cli.models.pretrained import from_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFERRED = ("acc_norm", "exact_match", "acc", "f1", "mcc")
"""The metrics to report, by preference; a task without any of these reports its first metric. If the harness computes a
metric through several filters, the task's first filter counts (strict-match for gsm8k)."""


SHARES = ("acc_norm", "exact_match", "acc")
"""The metrics that are shares of right answers. The harness itself gives the errors of all metrics only with a
bootstrap, which starts processes."""


def harness_scores(
    model: nn.Module, folder: Path, device: torch.device, evaluation: Harness, micro: MicroBatcher
) -> dict[str, Score]:
    """The score of each task or group of `eval.tasks`, named `<task>/<metric>`.

    Patterns (arc_*), tags (ai2_arc) and groups without a score of their own stand for their tasks. `folder`: contains
    the tokenizer. `model`: unused with `eval.server`. Needs the extra `lm_eval`; raises ConfigError if it is not
    installed or does not know a task, or if the server does not answer.
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
    manager = _task_manager(evaluation.include_path)
    tokenizer, chats = from_folder(AutoTokenizer, folder), evaluation.chat_template
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"eval.chat_template=true needs a tokenizer with a chat template, and that in {folder} has none"
        )

    def opened(samples: int) -> Any:
        if evaluation.server is not None:
            return _served(evaluation.server, folder, tokenizer, samples)
        return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, device=str(device), batch_size=samples)

    def evaluate(name: str, samples: int) -> Any:
        return simple_evaluate(
            model=opened(samples),
            tasks=[name],
            task_manager=manager,
            num_fewshot=evaluation.shots,
            apply_chat_template=chats,
            fewshot_as_multiturn=chats,
            limit=evaluation.samples,
            batch_size=samples,
            bootstrap_iters=0,
            log_samples=False,
        )

    scores: dict[str, Score] = {}
    for name in _matched(manager, evaluation.tasks):  # one by one, because the results do not name the tasks of a tag
        output = micro.run(partial(evaluate, name))
        results = {**output["results"], **output.get("groups", {})}
        names = [name] if numbers(results.get(name, {})) else list(output["configs"])
        counts = {task: counted["effective"] for task, counted in output["n-samples"].items()}
        scores |= chosen(names, results, counts)
    return scores


def _matched(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The tasks that patterns, tags and names stand for; simple_evaluate takes no patterns. ConfigError if one stands
    for none."""
    matched = {task: manager.match_tasks([task]) for task in tasks}
    unknown = [task for task, names in matched.items() if not names]
    if unknown:
        raise ConfigError(
            f"eval.tasks names {unknown[0]}, which lm-evaluation-harness does not know; `lm-eval ls tasks` lists its "
            "tasks, and eval.include_path names a folder of your own"
        )
    return list(dict.fromkeys(name for names in matched.values() for name in names))


def _served(server: str, folder: Path, tokenizer: Any, samples: int) -> Any:
    """The model of a server with the API of OpenAI, by the harness's client. ConfigError if it does not answer."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoConfig

    try:
        with urlopen(f"{server}/v1/models", timeout=10) as answer:
            served = json.load(answer)["data"][0]
            name, longest = served["id"], served.get("max_model_len")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"eval.server={server} does not answer with a model ({error}); start a server of the checkpoint, such as "
            f"vllm serve {folder}, and give its address"
        ) from error
    return LocalCompletionsAPI(
        base_url=f"{server}/v1/completions",
        model=name,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        add_bos_token=tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1],
        max_length=longest or from_folder(AutoConfig, folder).max_position_embeddings,
        batch_size=samples,
    )


@lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """The harness's task manager, with the user's own tasks. It takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def chosen(
    tasks: Sequence[str], results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]
) -> dict[str, Score]:
    """The preferred metric of each task. `results`: from the harness, with keys such as "acc_norm,none". `counts`: the
    number of samples of tasks."""
    scores = {}
    for task in tasks:
        values = numbers(results[task])
        metric = next((name for name in PREFERRED if name in values), next(iter(values)))
        count = counts.get(task, results[task].get("sample_len"))  # a group has only the latter, by version
        known = metric in SHARES and count and 0 <= values[metric] <= 1
        error = binomial(values[metric], count) if known and count else None
        scores[f"{task}/{metric}"] = Score(values[metric], error, count)
    return scores


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one task, by name without the filter, in the task's order."""
    values: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and "stderr" not in metric and isinstance(value, int | float):
            values.setdefault(metric, float(value))
    return values
