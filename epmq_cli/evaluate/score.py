"""Scores of a model on the tasks of a suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from epmq_cli.config import schema
from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.labels import UNLABELLED, WITHOUT
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.data.ranking import Ranking
from epmq_cli.data.samples import Samples
from epmq_cli.data.sampling import batches, check_some
from epmq_cli.data.suite import TEXT_METRICS
from epmq_cli.errors import DataError
from epmq_cli.evaluate.lm_eval import harness_scores
from epmq_cli.evaluate.metrics import CORRELATIONS, PERPLEXITY, Score
from epmq_cli.evaluate.perplexity import perplexity, window_losses
from epmq_cli.evaluate.ranking import ranked_score
from epmq_cli.evaluate.standard_errors import measured
from epmq_cli.evaluate.written import WRITTEN
from epmq_cli.families.family import Family
from epmq_cli.families.tasks.adapter import Decode, Head, Predict
from epmq_cli.families.tasks.embedding import Embedding
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.models.fast_linears import fast_linears
from epmq_cli.runtime import distributed
from epmq_cli.runtime.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

Scores = dict[str, dict[str, Score]]
"""stage -> task -> score: a fraction of 1, or a perplexity."""

ScoreCache = Callable[["ScoredTask", Callable[[], Score]], Score]
"""Returns a task's score from a cache, or else computes it by the function."""


def compute(task: ScoredTask, make: Callable[[], Score]) -> Score:
    """Computes the score, without a cache."""
    return make()


def restored(scores: Scores) -> Scores:
    """The scores, which were lists if they were read from JSON."""
    return {stage: {task: Score(*score) for task, score in by_task.items()} for stage, by_task in scores.items()}


UNSCORED = Samples(())
"""The samples of a task that is not scored."""


@dataclass(frozen=True)
class ScoredTask:
    """A task ready to be scored: its test samples, the functions that make batches and predictions, its head on the
    device, and the metric.

    `classes`: their number, for tasks without heads; `names`: the names of the head's classes. `processor`: the folder
    of the tokenizer or image processor, if it is not the base's. For perplexity `samples` has one input, the tokens of
    all documents (tokens,), which are read in windows of `length` that start `stride` tokens apart; (tokens, 2) if only
    those with a 1 beside them count. `talks`: whether any document of a language model is a conversation; `text`: the
    tokens of all of them, likewise. `decode`: turns predictions
    into texts, for metrics of texts. `ranking`: the queries and documents of the samples, if the metric is of their
    order.
    """

    name: str
    samples: Samples
    collate: Collate
    head: Head
    predict: Predict
    metric: str = "accuracy"
    length: int = 0
    stride: int = 0
    classes: int | None = None
    processor: Path | None = None
    names: tuple[str, ...] | None = None
    talks: bool | None = None
    text: Tensor | None = None
    decode: Decode | None = None
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        if self.samples is not UNSCORED:
            check_samples(self)

    @property
    def steps(self) -> int:
        """The amount of work, in samples or windows of tokens."""
        if self.ranking is not None:
            return len(self.ranking.queries) + len(self.ranking.documents)
        if self.metric != PERPLEXITY:
            return len(self.samples)
        return 1 + max(0, math.ceil((len(self.samples.inputs[0]) - self.length) / self.stride))


def check_labelled(task: str, labels: Tensor) -> None:
    """Raises DataError if no sample has a label, which hub data sets write as -1."""
    if len(labels) and bool((labels == UNLABELLED).all()):
        raise DataError(
            f"task {task}: its test samples have no labels, all are -1, as in the test splits of GLUE; give a split or "
            f"a file with labels in suite.tasks.{task}.data, such as test: validation for GLUE; {WITHOUT}"
        )


def check_samples(task: ScoredTask) -> None:
    """Raises DataError if the task's metric cannot compare predictions with labels."""
    labels, where = task.samples.labels, f"task {task.name}"
    check_some(task.name, "test", len(task.samples))
    if task.metric == PERPLEXITY:
        return
    if task.metric in TEXT_METRICS:
        if task.samples.references is None:
            raise DataError(
                f"{where} has no texts to compare answers with; name their column in data.answer; {WITHOUT}"
            )
        return
    if task.ranking is not None:
        if not task.ranking.queries:
            raise DataError(f"{where} has no query with a relevant document among its test samples; check data.test")
        return
    if labels is None:
        raise DataError(f"{where} has no labels to score its test samples by; {WITHOUT}")
    check_labelled(task.name, labels)
    _check_varied(where, task.metric, labels)
    outputs = len(task.head["weight"]) if "weight" in task.head else None
    if labels.is_floating_point():
        _check_numbers(where, task.metric, outputs)
        return
    if task.metric in CORRELATIONS:
        raise DataError(
            f"{where}: {task.metric} compares numbers, and the labels of the data are classes; set data.regression: "
            "true where the source has that option, or metric: accuracy"
        )
    if outputs == 1:
        raise DataError(
            f"{where}: the expert's head has one output, a number, and the labels of the data are classes; set "
            "data.regression: true and metric: spearman to compare ranks, or use an expert with one output a class"
        )
    classes = outputs or task.classes
    highest, lowest = int(labels.max()), int(labels.min())
    if classes is not None and (highest >= classes or lowest < 0):
        who = "its head has" if outputs else "there are"
        raise DataError(
            f"{where}: labels must lie in 0..{classes - 1} as {who} {classes} classes, got {lowest}..{highest}; name "
            "the values of the classes in data.labels, in their order"
        )


def _check_varied(where: str, metric: str, labels: Tensor) -> None:
    """Raises DataError if a correlation is undefined because all labels are equal."""
    if metric != "accuracy" and bool((labels == labels[0]).all()):
        raise DataError(
            f"{where}: {metric} needs labels that differ, and those of all {len(labels)} test samples are "
            f"{labels[0].item():g}; give more samples (data.test, eval.samples), or use accuracy for classes"
        )


def _check_numbers(where: str, metric: str, outputs: int | None) -> None:
    """Raises DataError if labels are numbers and the metric or the head is for classes."""
    if metric not in CORRELATIONS:
        raise DataError(f"{where}: {metric} compares classes, and the labels of the data are numbers; use spearman")
    if outputs not in (None, 1):
        raise DataError(
            f"{where}: the labels of the data are numbers, and the expert's head has {outputs} outputs, one a class; "
            "use an expert with one output, or labels that are classes"
        )


@dataclass(frozen=True)
class Scorer:
    """Scores models of a family on a device, by the options of `eval`."""

    evaluation: schema.Evaluation
    family: Family
    device: torch.device

    @cached_property
    def micro(self) -> MicroBatcher:
        """Chooses how many samples run through a model at a time."""
        return MicroBatcher(
            self.evaluation.batch_size,
            "scoring",
            "lower max_length of the suite's tasks, use a device with more memory, or device=cpu",
        )

    def scores(
        self,
        model: nn.Module,
        tasks: Sequence[ScoredTask],
        stage: str,
        folder: Path,
        score_cache: ScoreCache = compute,
        before: Callable[[ScoredTask], None] = lambda task: None,
    ) -> Scores:
        """The scores by task name, under the stage's name: of the suite's tasks, or of tasks of lm-evaluation-harness.

        `folder`: contains the tokenizer for the harness, which uses neither cache nor `before`. `before`: called before
        each task whose score is computed.
        """
        if isinstance(self.evaluation, schema.Harness):
            with distributed.single_process():
                return {stage: harness_scores(model, folder, self.device, self.evaluation, self.micro)}

        def computed(task: ScoredTask) -> Score:
            before(task)
            with fast_linears(model):
                return self.score(model, task, advance)

        with bar(f"score {stage}", sum(task.steps for task in tasks)) as advance:
            return {stage: {task.name: score_cache(task, partial(computed, task)) for task in tasks}}

    @torch.inference_mode()
    def score(self, model: nn.Module, task: ScoredTask, advance: Callable[[int], None] = lambda count: None) -> Score:
        """The value of the task's metric. `advance`: called with the number of finished samples, or of windows."""
        language = self.family.tasks
        if task.ranking is not None and isinstance(language, Embedding):
            texts = (task.ranking.queries, task.ranking.documents)
            queries, documents = (self._predictions(model, task, Samples(own), advance) for own in texts)
            return ranked_score(task.metric, task.ranking, lambda some: language.similarities(queries[some], documents))
        if not isinstance(language, LanguageModel) or task.decode is not None:
            predictions = self._predictions(model, task, task.samples, advance)
            if task.decode is not None:
                assert task.samples.references is not None
                return WRITTEN[task.metric](task.decode(predictions), task.samples.references)
            assert task.samples.labels is not None
            return measured(task.metric, predictions, task.samples.labels)

        def losses(batch: Batch) -> Tensor:
            return window_losses(lambda ids: language.token_logits(model, ids.to(self.device)), batch["ids"])

        def losses_of(ids: Tensor) -> Tensor:
            values = self.micro.rows(losses, {"ids": ids})
            advance(len(ids))
            return values

        ids: Tensor = task.samples.inputs[0]
        return perplexity(losses_of, ids, task.length, task.stride, self.micro.most)

    def _predictions(
        self, model: nn.Module, task: ScoredTask, samples: Samples, advance: Callable[[int], None]
    ) -> Tensor:
        """The predictions for samples, in their order, on the CPU."""
        order, predictions = samples.order_by_length(), []
        for batch in batches(samples.take(order), task.collate, self.micro.most, self.device):
            predictions.append(self.micro.rows(lambda part: task.predict(model, part, task.head).cpu(), batch))
            advance(len(predictions[-1]))
        return torch.cat(predictions)[torch.tensor(order).argsort()]
