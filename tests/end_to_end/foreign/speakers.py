"""Jobs of models without their own classifiers: CLIP, whose classes are words; T5, which generates answers; and
decoders."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.conftest import WORDS
from tests.end_to_end.foreign.kinds import KINDS, quiet
from tests.end_to_end.foreign.processors import PROCESSORS
from tests.end_to_end.foreign.tasks import MARGIN, ROWS, pictures, texts, write_classes, write_table

TEMPLATE = "a photo of a {}"
LENGTH = 16
CLASS_ORDERS = {
    "listed": "the order is the same in the suite's classes and in the data's labels",
    "sorted": "the classes are in the order of the folders' sorted names",
    "given": "the classes are in an order of the user's, and the folders are in that of their names",
}
ASKED = {"given": "classes in another order than the folders' names are matched by name, or asked for"}
"""Why a refusal of an order is correct too, if it is."""


@torch.inference_mode()
def clip_data(order: str, expert: Any, processor: Any, tokenizer: Any, place: Path) -> tuple[dict[str, Any], list[str]]:
    """Writes class folders of pictures with the expert's predictions; returns the suite entry and the classes in its
    order.

    `expert`: the base with the expert's tower.
    """
    drawn = pictures(3)
    with quiet():
        read = tokenizer([TEMPLATE.format(word) for word in WORDS], return_tensors="pt", padding=True)
        seen = expert.get_image_features(**processor(images=drawn, return_tensors="pt")).pooler_output
        known = expert.get_text_features(**read).pooler_output
    logits = 100 * normalize(seen, dim=-1) @ normalize(known, dim=-1).T
    names, rows = _balanced(logits)
    if order == "sorted":
        names = sorted(names)
    elif names == sorted(names):
        names = names[::-1]
    columns = logits[:, [WORDS.index(name) for name in names]].argmax(-1).tolist()
    entry = write_classes(place, [drawn[row] for row in rows], [names[columns[row]] for row in rows])
    return entry | ({"labels": names} if order == "listed" else {}), names


def _balanced(logits: Tensor) -> tuple[list[str], list[int]]:
    """Three of the words such that most pictures clearly belong to one of them, and each has some pictures; and
    those pictures."""
    best: tuple[int, list[str], list[int]] = (0, [], [])
    for chosen in combinations(range(len(WORDS)), 3):
        part = logits[:, list(chosen)]
        top = part.topk(2, -1).values
        rows = torch.nonzero(top[:, 0] - top[:, 1] > MARGIN).flatten().tolist()
        fewest = int(torch.bincount(part[rows].argmax(-1), minlength=3).min())
        if fewest > best[0]:
            best = (fewest, [WORDS[index] for index in chosen], rows)
    assert best[0], "no words that the pictures are told apart by"
    return best[1], best[2]


@torch.inference_mode()
def answer_data(
    processor: str, expert: Any, tokenizer: Any, source: str, place: Path
) -> tuple[dict[str, Any], list[str]]:
    """Writes a table of texts with the expert's own answers; returns its entry and the possible answers."""
    drawn = texts(3, PROCESSORS[processor].capitals)[:ROWS]
    read = tokenizer(drawn, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with quiet():
        given = expert.generate(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            max_length=10,
            do_sample=False,
            num_beams=1,
        )
    answers = [text.strip() for text in tokenizer.batch_decode(given, skip_special_tokens=True)]
    rows = [(text, answer) for text, answer in zip(drawn, answers, strict=True) if answer]
    classes = sorted({answer for _, answer in rows} | {"red", "blue"})
    return write_table(place, source, rows, classes), classes


@torch.inference_mode()
def running_text(processor: str, expert: Any, tokenizer: Any, place: Path) -> tuple[dict[str, Any], float]:
    """Writes documents; returns their entry and the expert's perplexity on them in windows of LENGTH tokens."""
    drawn = texts(3, PROCESSORS[processor].capitals)
    path = place / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn))
    ids = tokenizer("\n\n".join(drawn), return_tensors="pt")["input_ids"][0]
    total, count = 0.0, 0
    for window in torch.split(ids, LENGTH):
        if len(window) > 1:
            loss = float(expert(input_ids=window[None], labels=window[None]).loss)
            total, count = total + loss * (len(window) - 1), count + len(window) - 1
    entry = {"_target_": "epmq_cli.data.documents.Documents", "train": str(path), "test": str(path)}
    return entry, math.exp(total / count)


SPEAKERS = [name for name, kind in KINDS.items() if not kind.has_labels and name != "gpt2"]
