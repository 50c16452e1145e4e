"""Which jobs of `epmq run` a user may have: processors, labels and sources of each kind, and what must come out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.foreign.kinds import KINDS, body_of, model, outputs, part, quiet
from tests.foreign.labels import LABELS, Labels
from tests.foreign.processors import PROCESSORS, write_base
from tests.foreign.tasks import SOURCES, clear, pictures, spread_out, texts, write_classes, write_table
from tests.foreign.users import suite

RUN = ("bert", "roberta", "distilbert", "deberta", "vit")


@dataclass(frozen=True)
class Job:
    """One task with its expert, as a user could have it."""

    kind: str
    processor: str
    labels: str = "numbers"
    source: str = "csv"

    def __str__(self) -> str:
        return "+".join((self.kind, self.processor, self.labels, self.source))

    @property
    def may_be_refused(self) -> str | None:
        """Why a refusal is right as well; None where it must be taken."""
        return PROCESSORS[self.processor].may_be_refused or LABELS[self.labels].may_be_refused


def every_job() -> list[Job]:
    """All of them, in an order that never changes; of pictures in class folders only the labels that have names."""
    found = []
    for kind in (KINDS[name] for name in RUN):
        same = "pixels-same" if kind.name == "vit" else "same"
        found += [Job(kind.name, name) for name, processor in PROCESSORS.items() if processor.applies(kind)]
        found += [Job(kind.name, same, name) for name, labels in LABELS.items() if labels.listed or kind.name != "vit"]
        if kind.is_text_classifier:
            found += [Job(kind.name, same, "permuted", name) for name in SOURCES]
        found += [
            Job(kind.name, name, "permuted") for name, made in PROCESSORS.items() if made.applies(kind) and name != same
        ]
    return list(dict.fromkeys(found))


def quick_jobs(jobs: list[Job]) -> set[Job]:
    """Of each value of each axis one job, the kinds taking turns."""
    found: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        for axis in ("processor", "labels", "source"):
            found.setdefault((axis, getattr(job, axis)), []).append(job)
    return {choices[(7 * number) % len(choices)] for number, choices in enumerate(found.values())}


@dataclass(frozen=True)
class Ready:
    """What a user has, and what must come of it: the expert's merged part, and what it says."""

    suite: dict[str, Any]
    parameters: dict[str, Tensor]
    outputs: Tensor


def ready(job: Job, place: Path) -> Ready:
    """The folders of a job, whose labels are what the expert predicts with its own processor."""
    kind, labels = KINDS[job.kind], LABELS[job.labels]
    base, folder = place / "base", place / "expert"
    expert = copy.deepcopy(model(kind.name, "a"))
    with quiet():
        body_of(kind, model(kind.name, "base")).save_pretrained(base)
    write_base(kind, job.processor, base)
    folder.mkdir()
    PROCESSORS[job.processor].write(base, folder)
    data = (_of_pictures if kind.name == "vit" else _of_texts)(job, labels, expert, base, folder, place)
    expert.config.id2label = dict(enumerate(labels.own or (f"LABEL_{index}" for index in range(len(labels.column)))))
    expert.config.label2id = {name: index for index, name in expert.config.id2label.items()}
    with quiet():
        expert.save_pretrained(folder)
    entry = suite(kind, base, {"task": folder}, data)
    return Ready(entry, part(kind, expert), outputs(kind, body_of(kind, expert)))


def _own(kind: type, folder: Path, base: Path) -> Any:
    """The processor of an expert, or of the base where it has none."""
    with quiet():
        return kind.from_pretrained(folder if len(list(folder.iterdir())) else base)  # type: ignore[attr-defined]


def _of_texts(job: Job, labels: Labels, expert: Any, base: Path, folder: Path, place: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    kind = KINDS[job.kind]
    expert.config.save_pretrained(folder if any(folder.iterdir()) else place / "config")  # AutoTokenizer asks it
    tokenizer = _own(AutoTokenizer, folder, base)
    drawn = texts(3, PROCESSORS[job.processor].capitals)
    batch = dict(tokenizer(drawn, padding=True, truncation=True, max_length=16, return_tensors="pt"))
    if kind.name == "distilbert":
        batch.pop("token_type_ids", None)
    rows, classes = _predicted(expert, batch)
    return write_table(
        place,
        job.source,
        [(drawn[row], labels.column[found]) for row, found in zip(rows, classes, strict=True)],
        labels.listed,
    )


def _of_pictures(job: Job, labels: Labels, expert: Any, base: Path, folder: Path, place: Path) -> dict[str, Any]:
    from transformers import AutoImageProcessor

    drawn = pictures(3)
    processor = _own(AutoImageProcessor, folder, base)
    rows, classes = _predicted(expert, {"pixel_values": processor(images=drawn, return_tensors="pt")["pixel_values"]})
    names = labels.column if labels.listed else tuple(f"class{index}" for index in range(3))
    entry = write_classes(place, [drawn[row] for row in rows], [names[found] for found in classes])
    return entry | ({"labels": list(labels.listed)} if labels.listed else {})


def _predicted(expert: Any, batch: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    spread_out(expert, batch)
    with torch.inference_mode(), quiet():
        return clear(expert(**batch).logits)
