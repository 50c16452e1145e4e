"""The jobs of `epmq run` that a user may have: processors, labels and sources of each kind, and the expected
results."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.end_to_end.foreign.kinds import KINDS, Kind, body_of, model, outputs, part, quiet
from tests.end_to_end.foreign.labels import LABELS, Labels
from tests.end_to_end.foreign.processors import PROCESSORS, write_base
from tests.end_to_end.foreign.speakers import ASKED, CLASS_ORDERS, SPEAKERS, answer_data, clip_data, running_text
from tests.end_to_end.foreign.tasks import (
    SOURCES,
    balance_predictions,
    clear,
    pictures,
    texts,
    write_classes,
    write_table,
)
from tests.end_to_end.foreign.users import suite
from tests.helpers.tiers import covering

CLASSIFIERS = ("bert", "roberta", "distilbert", "deberta", "vit")
NONE = "none"


@dataclass(frozen=True)
class Job:
    """One task with its expert, in a form that a user could have."""

    kind: str
    processor: str
    labels: str = NONE
    source: str = "csv"

    def __str__(self) -> str:
        return "+".join((self.kind, self.processor, self.labels, self.source))

    @property
    def may_be_refused(self) -> str | None:
        """Why a refusal is correct too; None if the job must run."""
        labels = LABELS[self.labels].may_be_refused if self.labels in LABELS else ASKED.get(self.labels)
        return PROCESSORS[self.processor].may_be_refused or labels


def every_job() -> list[Job]:
    """All jobs, in a fixed order."""
    found = [job for name in CLASSIFIERS for job in _of_classifier(KINDS[name])]
    for kind in (KINDS[name] for name in SPEAKERS):
        names = [name for name, processor in PROCESSORS.items() if processor.applies(kind)]
        orders = tuple(CLASS_ORDERS) if kind.name == "clip" else (NONE,)
        found += [Job(kind.name, name, order) for name in names for order in orders]
    return list(dict.fromkeys(found))


def _of_classifier(kind: Kind) -> list[Job]:
    """Each processor with class numbers and with permuted names; all labels and sources with the same processor."""
    same = "pixels-same" if kind.name == "vit" else "same"
    names = [name for name, processor in PROCESSORS.items() if processor.applies(kind)]
    found = [Job(kind.name, name, labels) for name in names for labels in ("numbers", "permuted")]
    found += [Job(kind.name, same, name) for name in LABELS]
    return found + ([Job(kind.name, same, "permuted", name) for name in SOURCES] if kind.is_text_classifier else [])


def quick_jobs(jobs: list[Job]) -> set[Job]:
    """The default tier: jobs that have each value of each axis at least once."""
    return covering(jobs, ("processor", "labels", "source"))


@dataclass(frozen=True)
class PreparedJob:
    """The suite of a user, and the expected results: the expert's merged part, its outputs, and its score."""

    suite: dict[str, Any]
    parameters: dict[str, Tensor]
    outputs: Tensor
    score: float


def prepare(job: Job, place: Path) -> PreparedJob:
    """Writes the folders of a job. Its labels are the expert's predictions with its own processor."""
    kind = KINDS[job.kind]
    base, folder = place / "base", place / "expert"
    expert = copy.deepcopy(model(kind.name, "a"))
    whole = model(kind.name, "base")
    with quiet():
        (body_of(kind, whole) if kind.has_labels else whole).save_pretrained(base)
    write_base(kind, job.processor, base)
    folder.mkdir()
    PROCESSORS[job.processor].write(base, folder)
    owner = folder if any(folder.iterdir()) else base
    if owner is folder:
        expert.config.save_pretrained(folder)  # AutoTokenizer reads the model type from it
    data, fields, score = _data(job, expert, base, owner, place)
    with quiet():
        (body_of(kind, expert) if kind.name == "clip" else expert).save_pretrained(folder)
    entry = suite(kind, base, {"task": folder}, data)
    entry["tasks"]["task"] |= fields
    return PreparedJob(entry, part(kind, expert), outputs(kind, body_of(kind, expert)), score)


def _data(job: Job, expert: Any, base: Path, owner: Path, place: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """The suite entry of the data, further fields of the task, and the expert's score."""
    from transformers import AutoImageProcessor, AutoTokenizer

    kind = KINDS[job.kind]
    with quiet():
        processor = AutoImageProcessor.from_pretrained(owner) if kind.name in ("vit", "clip") else None
        tokenizer = None if kind.name in ("vit", "clip") else AutoTokenizer.from_pretrained(owner)
    if kind.name == "clip":
        words, reader = AutoTokenizer.from_pretrained(base), copy.deepcopy(model("clip", "base"))
        reader.vision_model.load_state_dict(expert.vision_model.state_dict())  # the saved part of the expert
        data, classes = clip_data(job.labels, reader, processor, words, place)
        return data, {"classes": classes}, 1.0
    if kind.family == "t5":
        data, classes = answer_data(job.processor, expert, tokenizer, job.source, place)
        return data, {"classes": classes}, 1.0
    if kind.is_decoder:
        data, score = running_text(job.processor, expert, tokenizer, place)
        return data, {}, score
    labels = LABELS[job.labels]
    data = _pictures(labels, expert, processor, place) if kind.name == "vit" else _texts(job, expert, tokenizer, place)
    expert.config.id2label = dict(enumerate(labels.own or (f"LABEL_{index}" for index in range(len(labels.column)))))
    expert.config.label2id = {name: index for index, name in expert.config.id2label.items()}
    return data, {}, 1.0


def _texts(job: Job, expert: Any, tokenizer: Any, place: Path) -> dict[str, Any]:
    labels, drawn = LABELS[job.labels], texts(3, PROCESSORS[job.processor].capitals)
    batch = dict(tokenizer(drawn, padding=True, truncation=True, max_length=16, return_tensors="pt"))
    if job.kind == "distilbert":
        batch.pop("token_type_ids", None)
    found = zip(*_predicted(expert, batch), strict=True)
    rows = [(drawn[row], labels.column[predicted]) for row, predicted in found]
    return write_table(place, job.source, rows, labels.listed)


def _pictures(labels: Labels, expert: Any, processor: Any, place: Path) -> dict[str, Any]:
    drawn = pictures(3)
    rows, classes = _predicted(expert, {"pixel_values": processor(images=drawn, return_tensors="pt")["pixel_values"]})
    names = labels.column if labels.listed or labels.own else tuple(f"class{index}" for index in range(3))
    entry = write_classes(place, [drawn[row] for row in rows], [names[found] for found in classes])
    return entry | ({"labels": list(labels.listed)} if labels.listed else {})


def _predicted(expert: Any, batch: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    balance_predictions(expert, batch)
    with torch.inference_mode(), quiet():
        return clear(expert(**batch).logits)
