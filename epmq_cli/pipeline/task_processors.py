"""Chooses each task's tokenizer or image processor: the base's, or the expert's own if its outputs differ
(`suite.processor`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from epmq_cli.config.schema import GENERATE, Calib
from epmq_cli.data.chats import Chat
from epmq_cli.data.sampling import task_seed
from epmq_cli.data.sounds import Sound
from epmq_cli.data.suite import Task
from epmq_cli.errors import CheckpointError, DataError, ModelError
from epmq_cli.families.family import Family
from epmq_cli.families.processor_differences import LONGEST, difference
from epmq_cli.families.processors import own_images, own_tokenizer
from epmq_cli.families.rendering import WORDS
from epmq_cli.families.sound_features import own_extractor
from epmq_cli.families.tasks.language_model import LanguageModel
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.model_folder import ModelFolder, refuse_links
from epmq_cli.models.open_clip.convert import CONFIG, own_processor
from epmq_cli.models.pretrained import config_of
from epmq_cli.models.processor_files import PROBE
from epmq_cli.models.processor_folder import Processor, processor_files, same_files
from epmq_cli.runtime.console import say

PROCESSORS = "processors"
"""The folder of a checkpoint with the tasks' own processors."""
SAMPLES = {"texts": 256, "pictures": 32, "sounds": 32}
"""The largest number of calibration samples of a task on which processors are compared."""
VARIED = 32  # samples that are also compared in other forms
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
"""The processors of the tasks that have their own tokenizer or image processor."""
SamplesOf = Callable[[Task], Sequence[Any]]
"""Returns the samples of a task on which processors are compared."""


def task_processors(
    family: Family, models: SuiteModels, tasks: Sequence[Task], samples_of: SamplesOf
) -> dict[str, Processor]:
    """The processors of the tasks that use their expert's own tokenizer or image processor; other tasks use the base's.
    Raises ModelError if an expert's processor is unusable, or if it differs and the task's `processor` is `same`."""
    processors = {}
    for task in tasks:
        own = _chosen(family, models, task, samples_of)
        if own is not None:
            processors[task.name] = own
    return processors


def calibration_samples(seed: int, family: Family, calib: Calib) -> SamplesOf:
    """Draws some of the calibration samples or documents of a task; without data, a conversation."""

    def draw(task: Task) -> Sequence[Any]:
        if calib.source == GENERATE:
            return [WORDS]
        most = SAMPLES[family.reads]
        if isinstance(family.tasks, LanguageModel) and task.documents is not None:
            most = min(most, task.documents)
        return task.data.load("train", most, task_seed(seed, task.name)).inputs

    return draw


def _chosen(family: Family, models: SuiteModels, task: Task, samples_of: SamplesOf) -> Processor | None:
    """The expert's own processor if the task uses it, else None."""
    base, expert = models.base, models.experts[task.name]
    bases = processor_files(base.path, family.reads)
    folder = expert.path
    described = (folder / CONFIG).is_file()  # otherwise skip transformers, whose import takes seconds
    if family.reads == "pictures" and described and not processor_files(folder, family.reads):
        folder = own_processor(folder, config_of(base.path), expert.role) or folder
    files = processor_files(folder, family.reads)
    if not files or same_files(files, bases):
        return None
    own, what = Processor(folder, models.source.vocabulary_size), KINDS[family.reads]
    if not bases:
        return _without_base(base, expert, task, own, what)
    samples = samples_of(task)
    try:
        changed = difference(family, base.path, task, own, samples) or _varied(family, base.path, task, own, samples)
    except ModelError as error:
        if task.processor != "base":
            raise ModelError(
                f"{expert.role}: its own {what} cannot be used: {error}, or set suite.processor=base to use the "
                "base's for its task"
            ) from error
        log.warning("%s: its own %s cannot be used (%s); the base's is used", expert.role, what, error)
        return None
    return None if changed is None else _by_option(expert, task, own, f"its own {what} {changed}")


def _varied(family: Family, base: Path, task: Task, own: Processor, samples: Sequence[Any]) -> str | None:
    """The difference on variations of the samples, or None. Test samples may differ from calibration samples: texts may
    be in capitals, and pictures may have other sizes. None also if the expert's processor fails on the variations."""
    try:
        return difference(family, base, task, own, variations(samples))
    except (ModelError, DataError):
        return None


def variations(samples: Sequence[Any]) -> list[Any]:
    """Variations of some of the samples: texts in other cases, with accents, doubled spaces and other scripts, or
    pictures of other sizes. None of sounds."""
    some = [samples[index] for index in range(min(VARIED, len(samples)))]
    if some and isinstance(some[0], Sound):
        return []
    if some and isinstance(some[0], Image.Image):
        return [picture.convert("RGB").resize(size) for picture, size in zip(some, SIZES, strict=False)]
    return [_apply(form, sample) for sample in some for form in FORMS]


def _apply(form: Callable[[str], str], sample: Any) -> Any:
    """Applies a form to a text, a pair of texts or a conversation."""
    if isinstance(sample, Chat):
        return Chat(
            [{**message, "content": form(message["content"])} for message in sample.messages],
            sample.where,
            sample.tools,
        )
    return tuple(map(form, sample)) if isinstance(sample, tuple) else form(sample[:LONGEST])


def _by_option(expert: ModelFolder, task: Task, own: Processor, changed: str) -> Processor | None:
    """Handles a difference according to the task's `processor` option."""
    if task.processor == "same":
        raise ModelError(
            f"{expert.role} ({expert.path}): {changed}; set suite.processor=expert to use it for its task, or "
            "suite.processor=base to use the base's"
        )
    if task.processor == "base":
        log.warning("%s: %s; suite.processor=base reads its task with the base's", expert.role, changed)
        return None
    say(f"{expert.role}: {changed}; epmq uses it for its task and saves it in {place(task.name)} of the checkpoint")
    return own


def _without_base(base: ModelFolder, expert: ModelFolder, task: Task, own: Processor, what: str) -> Processor:
    """The expert's processor, for a base that has none."""
    if task.processor != "expert":
        raise ModelError(
            f"base: {base.path} has no {what}, but {expert.role} has one; add the base's {what} to its folder, or set "
            "suite.processor=expert to use each expert's own for its task"
        )
    say(
        f"{expert.role}: the base has no {what}; epmq uses the expert's own for its task and saves it in "
        f"{place(task.name)} of the checkpoint"
    )
    return own


KINDS = {"texts": "tokenizer", "pictures": "image processor", "sounds": "feature extractor"}
LOADERS = {"texts": own_tokenizer, "pictures": own_images, "sounds": own_extractor}


def place(task: str) -> str:
    """The folder of a task's processor in a checkpoint. Its name is a valid file name and not hidden."""
    name = quote(task, safe=" ")
    return f"{PROCESSORS}/{f'%2E{name[1:]}' if name.startswith('.') else name}"


def save_processors(family: Family, base: Path, processors: Processors, checkpoint: Path) -> None:
    """Writes the tokenizers, image processors or feature extractors of tasks into a checkpoint with `save_pretrained`,
    and what folders of the family have beside them. `base`: the folder whose config gives the class of processors that
    do not name their class."""
    for task, processor in processors.items():
        loaded = LOADERS[family.reads](base, processor)
        loaded.save_pretrained(checkpoint / place(task))
    family.save_beside(checkpoint)


def saved_processors(checkpoint: Path, record: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Processor]:
    """The processors of tasks that a checkpoint's record lists. Raises CheckpointError if one is missing."""
    listed = record.get(PROCESSORS) or []
    processors = {}
    for task in (task for task in tasks if isinstance(listed, list) and task in listed):
        folder = checkpoint / place(task)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}, the processor of task {task}, is missing; fetch the checkpoint again, or write it again "
                "with epmq run"
            )
        refuse_links(folder, "checkpoint")
        processors[task] = Processor(folder)
    return processors


def probes(family: Family, models: SuiteModels) -> SamplesOf:
    """Synthetic samples for a merge without data: texts from the base's vocabulary, or noise."""
    samples: list[Sequence[Any]] = []

    def synthetic(task: Task) -> Sequence[Any]:
        if not samples:
            made = {"pictures": _pictures, "sounds": _sounds}.get(family.reads)
            samples.append(made() if made else list(_texts(models.base.path)))
        return samples[0]

    return synthetic


def _texts(base: Path) -> Iterator[str]:
    """Texts of some of the base's tokens."""
    tokenizer = own_tokenizer(base)
    special = set(tokenizer.all_special_tokens)
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in special)
    step = max(1, len(tokens) // 256)
    words = [tokenizer.convert_tokens_to_string([token]).strip() for _, token in tokens[::step][:256]]
    for start in range(0, len(words), 8):
        yield " ".join(words[start : start + 8])


def _pictures() -> list[Any]:
    """Pictures of noise in three shapes."""
    import numpy as np

    generator = np.random.default_rng(0)
    coarse = [Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(3)]
    return [picture.resize(size) for picture, size in zip(coarse, SIZES, strict=True)]


def _sounds() -> list[Any]:
    """A second of noise in two rates."""
    import numpy as np

    generator = np.random.default_rng(0)
    rates = (16000, 8000)
    return [Sound(generator.normal(0, 0.1, rate).astype(np.float32), rate, "noise") for rate in rates]
