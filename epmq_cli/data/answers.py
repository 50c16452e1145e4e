"""Which tokens of sequences are answers, which `guidance.prompt_weight` and `assistant_only_loss` tell from prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from epmq_cli.data.samples import Samples
from epmq_cli.errors import DataError

PROMPTS, TEXTS = "conversations without an answer of the assistant", "texts, not conversations"
"""What tasks have that lack answers, or prompts."""

log = logging.getLogger("epmq")


def unmarked(samples: Samples) -> tuple[Samples, str | None]:
    """Sequences (tokens, 2) of ids and marks without the marks, as (tokens,), if all tokens have the same mark, and
    PROMPTS or TEXTS. Otherwise the samples as they are, and None."""
    marks = {mark for sequence in samples.inputs for mark in sequence[:, 1].tolist()}
    if len(marks) > 1:
        return samples, None
    return Samples([sequence[:, 0] for sequence in samples.inputs]), TEXTS if 1 in marks else PROMPTS


def check_answers(lacking: Mapping[str, str | None]) -> None:
    """DataError if no task has both prompts and answers, whose weights differ. Warns about tasks with prompts only.
    `lacking`: what `unmarked` says of each task."""
    if lacking and None not in lacking.values():
        kinds = ", ".join(f"{task} has {kind}" for task, kind in lacking.items())
        raise DataError(
            f"no task has both prompts and answers, which guidance.prompt_weight weighs against each other: {kinds}; "
            "set guidance.prompt_weight=1, or the data of a task to conversations with answers"
        )
    for task in (task for task, kind in lacking.items() if kind == PROMPTS):
        log.warning(
            "task %s calibrates on %s, so all its tokens count alike, and guidance.prompt_weight does not change it",
            *(task, PROMPTS),
        )
