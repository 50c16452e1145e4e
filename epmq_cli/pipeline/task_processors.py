"""Chooses each task's tokenizer or image processor: the base's, or the expert's own if it gives other inputs
(`suite.processor`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from epmq_cli.data.chats import Chat
from epmq_cli.data.sampling import task_seed
from epmq_cli.data.suite import Task
from epmq_cli.errors import CheckpointError, DataError, ModelError
from epmq_cli.families.family import Family
from epmq_cli.families.processor_differences import LONGEST, difference
from epmq_cli.families.processors import own_images, own_tokenizer
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.engine import SuiteModels
from epmq_cli.models.model_folder import ModelFolder, refuse_links
from epmq_cli.models.open_clip.convert import CONFIG, own_processor
from epmq_cli.models.pretrained import config_of
from epmq_cli.models.processor_files import PROBE
from epmq_cli.models.processor_folder import Processor, processor_files, same_files
from epmq_cli.runtime.console import say

PROCESSORS = "processors"
"""The folder of a checkpoint with the tasks' own processors."""
SAMPLES = {"texts": 256, "pictures": 32}
"""The largest number of a task's calibration samples that are compared."""
VARIED = 32  # of them are also compared in other forms
SIZES = ((320, 320), (480, 320), (300, 400))
FORMS: tuple[Callable[[str], str], ...] = (
    str.upper,
    str.lower,
    str.title,
    lambda text: text.replace(" ", "  "),
    lambda text: text.replace("e", "\u00e9"),
    lambda text: f"{PROBE} {text}",
)

log = logging.getLogger("epmq")

Processors = Mapping[str, Processor]
"""The tasks with their own tokenizer or image processor, and its folder."""
SamplesOf = Callable[[Task], Sequence[Any]]
"""Gives the samples of a task on which processors are compared."""


def task_processors(
    family: Family, models: SuiteModels, tasks: Sequence[Task], samples_of: SamplesOf
) -> dict[str, Processor]:
    """The tasks that use their expert's own tokenizer or image processor, and its folder; the others use the base's.
    ModelError if an expert's differs and the task's `processor` is `same`, or if it is unusable."""
    found = {}
    for task in tasks:
        own = _chosen(family, models, task, samples_of)
        if own is not None:
            found[task.name] = own
    return found


def calibration_samples(seed: int, family: Family) -> SamplesOf:
    """Some of the samples, or documents, that a task is calibrated on."""

    def drawn(task: Task) -> Sequence[Any]:
        most = SAMPLES[family.reads]
        if isinstance(family.tasks, LanguageModel) and task.documents is not None:
            most = min(most, task.documents)
        return task.data.load("train", most, task_seed(seed, task.name)).inputs

    return drawn


def _chosen(family: Family, models: SuiteModels, task: Task, samples_of: SamplesOf) -> Processor | None:
    """The expert's own processor if the task uses it."""
    base, expert = models.base, models.experts[task.name]
    bases = processor_files(base.path, family.reads)
    folder = expert.path
    described = (folder / CONFIG).is_file()  # else transformers, which takes seconds to import, need not be asked
    if family.reads == "pictures" and described and not processor_files(folder, family.reads):
        folder = own_processor(folder, config_of(base.path), expert.role) or folder
    files = processor_files(folder, family.reads)
    if not files or same_files(files, bases):
        return None
    own, what = Processor(folder, models.source.vocabulary_size), KINDS[family.reads]
    if not bases:
        return _instead(base, expert, task, own, what)
    samples = samples_of(task)
    try:
        found = difference(family, base.path, task, own, samples) or _elsewhere(family, base.path, task, own, samples)
    except ModelError as error:
        if task.processor != "base":
            raise ModelError(
                f"{expert.role}: its own {what} cannot be used: {error}, or set suite.processor=base, which reads its "
                "task with the base's"
            ) from error
        log.warning("%s: its own %s cannot be used (%s); the base's is used", expert.role, what, error)
        return None
    return None if found is None else _by_option(expert, task, own, f"its own {what} {found}")


def _elsewhere(family: Family, base: Path, task: Task, own: Processor, samples: Sequence[Any]) -> str | None:
    """The difference between the inputs of varied samples: test samples may differ from calibration samples, such as
    texts in capitals or pictures of other sizes. None if the expert's processor reads none of them."""
    try:
        return difference(family, base, task, own, variations(samples))
    except (ModelError, DataError):
        return None


def variations(samples: Sequence[Any]) -> list[Any]:
    """Texts in other cases, with accents, doubled spaces and other scripts, or pictures of other sizes, made of some of
    the samples."""
    some = [samples[index] for index in range(min(VARIED, len(samples)))]
    if some and isinstance(some[0], Image.Image):
        return [picture.convert("RGB").resize(size) for picture, size in zip(some, SIZES, strict=False)]
    return [_written(sample, form) for sample in some for form in FORMS]


def _written(sample: Any, form: Callable[[str], str]) -> Any:
    """A text, a pair of texts or a conversation in another form."""
    if isinstance(sample, Chat):
        return Chat([{**message, "content": form(message["content"])} for message in sample.messages], sample.where)
    return tuple(map(form, sample)) if isinstance(sample, tuple) else form(sample[:LONGEST])


def _by_option(expert: ModelFolder, task: Task, own: Processor, found: str) -> Processor | None:
    """Handles a difference as the task's `processor` says."""
    if task.processor == "same":
        raise ModelError(
            f"{expert.role} ({expert.path}): {found}; set suite.processor=expert to read its task with its own, or "
            "suite.processor=base to read it with the base's"
        )
    if task.processor == "base":
        log.warning("%s: %s; suite.processor=base reads its task with the base's", expert.role, found)
        return None
    say(f"{expert.role}: {found}; its task is read with its own, which the checkpoint has in {place(task.name)}")
    return own


def _instead(base: ModelFolder, expert: ModelFolder, task: Task, own: Processor, what: str) -> Processor:
    """The expert's processor for a base without one."""
    if task.processor != "expert":
        raise ModelError(
            f"base: {base.path} has no {what}, and {expert.role} has one of its own; put the base's files there, or "
            "set suite.processor=expert to read each task with its expert's own"
        )
    say(
        f"{expert.role}: its task is read with its own {what}, as the base has none; the checkpoint has it in "
        f"{place(task.name)}"
    )
    return own


KINDS = {"texts": "tokenizer", "pictures": "image processor"}


def place(task: str) -> str:
    """The folder of a task's processor in a checkpoint: a plain name, not hidden."""
    name = quote(task, safe=" ")
    return f"{PROCESSORS}/{f'%2E{name[1:]}' if name.startswith('.') else name}"


def save_processors(base: Path, processors: Processors, reads: str, checkpoint: Path) -> None:
    """Writes the tokenizers or image processors of tasks into a checkpoint, as transformers writes them. `base`: the
    folder whose config says of which kind those are that do not say it themselves."""
    for task, processor in processors.items():
        made = (own_images if reads == "pictures" else own_tokenizer)(base, processor)
        made.save_pretrained(checkpoint / place(task))


def saved_processors(checkpoint: Path, record: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Processor]:
    """The processors of tasks that a checkpoint has, by its record; CheckpointError where one is missing."""
    listed = record.get(PROCESSORS) or []
    found = {}
    for task in (task for task in tasks if isinstance(listed, list) and task in listed):
        folder = checkpoint / place(task)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}, with which task {task} is read, is not there; fetch the checkpoint again, or make it again "
                "with epmq run"
            )
        refuse_links(folder, "checkpoint")
        found[task] = Processor(folder)
    return found


def probes(family: Family, models: SuiteModels) -> SamplesOf:
    """Synthetic samples for a merge without data: texts from the base's vocabulary, or noise."""
    made: list[Sequence[Any]] = []

    def made_up(task: Task) -> Sequence[Any]:
        if not made:
            made.append(_pictures() if family.reads == "pictures" else list(_texts(models.base.path)))
        return made[0]

    return made_up


def _texts(base: Path) -> Iterator[str]:
    """Texts of some of the base's tokens."""
    tokenizer = own_tokenizer(base)
    special = set(tokenizer.all_special_tokens)
    known = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in special)
    step = max(1, len(known) // 256)
    words = [tokenizer.convert_tokens_to_string([token]).strip() for _, token in known[::step][:256]]
    for start in range(0, len(words), 8):
        yield " ".join(words[start : start + 8])


def _pictures() -> list[Any]:
    """Noise in pictures of three shapes."""
    import numpy as np

    generator = np.random.default_rng(0)
    coarse = [Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(3)]
    return [picture.resize(size) for picture, size in zip(coarse, SIZES, strict=True)]
