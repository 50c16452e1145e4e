"""Prepares tasks for scoring: draws test samples and puts labels into the order of the head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epmq_cli.data.chats import has_chats
from epmq_cli.data.ranking import RANKINGS, Ranking, some_queries
from epmq_cli.data.samples import Samples
from epmq_cli.data.sampling import scored_source, task_seed
from epmq_cli.data.suite import TEXT_METRICS, Task
from epmq_cli.errors import ModelError
from epmq_cli.evaluate.class_names import Heading, in_order_of_head, translated
from epmq_cli.evaluate.score import UNSCORED, ScoredTask, check_labelled
from epmq_cli.families.family import Family
from epmq_cli.families.inputs import check_inputs
from epmq_cli.families.tasks.adapter import Head
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.processor_folder import Processor
from epmq_cli.runtime.console import say


def head_names(family: Family, models: SuiteModels, task: Task, head: Head, scored: bool) -> tuple[str, ...] | None:
    """The class names of a task's head. Raises ModelError if they are invalid and the task is scored."""
    try:
        return family.class_names(task, models.experts[task.name], models.base, head)
    except ModelError:
        if scored:
            raise
        return None


@dataclass(frozen=True)
class EvaluationData:
    """Reads the test samples of tasks.

    `folder`: contains the model's config and the base's tokenizer or image processor. `count`: how many test samples
    are drawn, stratified by class; None for all, 0 if tasks are not scored. `seed` determines which.
    """

    family: Family
    folder: Path
    count: int | None
    seed: int

    def scored_task(
        self, task: Task, head: Head, names: tuple[str, ...] | None, processor: Processor | None = None
    ) -> ScoredTask:
        """A task with test samples, ready to be scored.

        `names`: the class names of the head. `processor`: the task's own tokenizer or image processor. Labels are in
        the order of the head. If the data order the classes differently, labels are mapped by class name.
        """
        family, folder = self.family, self.folder
        samples = UNSCORED if self.count == 0 else evaluation_samples(task, self.count, self.seed)
        check_inputs(family, task.name, samples.inputs)
        talks = ranking = text = None
        if samples is not UNSCORED:
            samples = family.tasks.worded(task, samples)
        if samples is not UNSCORED and task.metric in RANKINGS:
            ranking = Ranking.of(samples)
        if isinstance(family.tasks, LanguageModel) and samples is not UNSCORED:
            language = family.tasks
            talks, text = has_chats(samples.inputs), language.scored(folder, task, samples.inputs, processor)
            written = task.metric in TEXT_METRICS
            samples = language.questions(folder, task, samples, processor) if written else Samples([text])
        if ranking is None and samples.labels is not None and not samples.labels.is_floating_point():
            check_labelled(task.name, samples.labels)
            outputs = len(head["weight"]) if "weight" in head else None
            heading = Heading(task.name, names, outputs, family.heads == "own")
            matched = in_order_of_head(samples, heading, task)
            if matched.message:
                say(f"task {task.name}: {matched.message}")
            samples = translated(samples, matched.order, heading)
        return ScoredTask(
            name=task.name,
            samples=samples,
            collate=family.tasks.scoring(folder, task, processor),
            head=head,
            predict=family.predict(folder, task, processor),
            metric=task.metric,
            length=task.max_length,
            stride=task.stride or task.max_length,
            classes=len(task.classes) if task.classes else None,
            processor=processor.folder if processor else None,
            names=names,
            talks=talks,
            text=text,
            decode=family.decode(folder, task, processor),
            ranking=ranking,
        )


def evaluation_samples(task: Task, count: int | None, seed: int) -> Samples:
    """`count` test samples of a task, or all if None. The seed determines the samples. Perplexity needs no labels, so
    its samples have none."""
    data = scored_source(task)
    samples: Samples
    if count is None or not getattr(data, "streams", False):
        samples = data.load("test")
        if task.metric in RANKINGS:
            return some_queries(samples, count, task_seed(seed, task.name, "test"))
        return samples if count is None else samples.stratified(count, task_seed(seed, task.name, "test"))
    samples = data.load("test", count, task_seed(seed, task.name, "test"))
    return samples
