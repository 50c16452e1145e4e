"""The texts of the suite smollm3: dialogues, code and arithmetic that ship with packages of PyPI and with Python.

    pip install chatterbot-corpus==1.3.3 reasoning-gym==0.1.25

Dialogues: questions and answers of `chatterbot-corpus` (BSD-3), in English, without those that answer with code. Code:
functions with docstrings of Python's standard library (PSF), so another version of Python gives other texts.
Arithmetic: sums and differences of two numbers that generators of `reasoning-gym` (Apache-2.0) ask in two ways, by
fixed seeds. A hash divides train and test: of a dialogue's first message, of a module's name, of an expression. Test
texts that hold an answer or a run of GRAM words of the training texts are left out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train import GRAM, grams

Document = dict[str, Any]
"""{text} or {messages}."""
Keyed = Iterator[tuple[str, Document]]
"""Documents, each with the key that decides whether it is for training or for testing."""

TEST = 5  # one key in this many is for testing
TURNS = 4  # questions in a conversation that arithmetic is trained on
ASKED = 12000  # questions of each generator
EXPRESSION = re.compile(r"-?\d+ [-+] -?\d+")
FUNCTION = (200, 1500)  # characters of a function
LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo", "pydoc_data")
LIMITS = {
    "dialogues": {"train": 1500, "test": 150},
    "code": {"train": 800, "test": 60},
    "arithmetic": {"train": 2000, "test": 256},
}
"""The most documents of a task."""


def chat(turns: list[str]) -> Document:
    """A conversation that a user begins."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]}


def dialogues() -> Keyed:
    """Questions and answers; the first message is the key. A last message without an answer is left out."""
    import chatterbot_corpus
    import yaml

    for file in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        if file.stem == "coding":
            continue
        for told in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [" ".join(str(turn).split()) for turn in told]
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                yield re.sub(r"\W+", " ", turns[0].lower()).strip(), chat(turns)


def code() -> Keyed:
    """Functions and methods with docstrings; the module's path is the key."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if not set(LEFT_OUT).isdisjoint(name.parts):
            continue
        source = file.read_text(encoding="utf-8", errors="ignore")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                text = textwrap.dedent(str(ast.get_source_segment(source, node, padded=True)))
                if FUNCTION[0] <= len(text) <= FUNCTION[1]:
                    yield str(name), {"text": text}


def arithmetic() -> Keyed:
    """Questions with their answers; the expression is the key."""
    import reasoning_gym

    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    signs = {"operators": ["+", "-"], "allow_parentheses": False, "allow_negation": False}
    for seed, (name, options) in enumerate({"chain_sum": sums, "basic_arithmetic": sums | signs}.items()):
        for entry in reasoning_gym.create_dataset(name, size=ASKED, seed=seed, **options):
            expression = EXPRESSION.search(entry["question"])
            if expression:
                yield expression[0], chat([entry["question"], entry["answer"]])


def joined(documents: list[Document]) -> list[Document]:
    """Conversations of TURNS questions each."""
    groups = [documents[start : start + TURNS] for start in range(0, len(documents), TURNS)]
    return [{"messages": [message for each in group for message in each["messages"]]} for group in groups]


def divided(documents: Keyed) -> dict[str, list[Document]]:
    """Distinct documents in the order of their hashes: one key in TEST is for testing."""
    parts: dict[str, dict[str, Document]] = {"train": {}, "test": {}}
    for key, document in documents:
        split = "test" if number(key) % TEST == 0 else "train"
        parts[split].setdefault(json.dumps(document), document)
    return {split: [found[text] for text in sorted(found, key=number)] for split, found in parts.items()}


def number(text: str) -> int:
    """The first 32 bits of a text's hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def written(document: Document) -> list[str]:
    """What a model learns from a document: the text, or the assistant's messages."""
    if "text" in document:
        return [document["text"]]
    return [message["content"] for message in document["messages"] if message["role"] == "assistant"]


def unseen(documents: list[Document], train: list[Document], whole: bool) -> list[Document]:
    """The documents that share no run of words with `train` and, if `whole`, no answer."""
    known = set[tuple[str, ...]]().union(*(grams(text) for document in train for text in written(document)))
    answers = {text.lower() for document in train for text in written(document)} if whole else set()
    return [
        document
        for document in documents
        if all(known.isdisjoint(grams(text)) and text.lower() not in answers for text in written(document))
    ]


SOURCES: dict[str, Callable[[], Keyed]] = {"dialogues": dialogues, "code": code, "arithmetic": arithmetic}


def texts(task: str) -> dict[str, list[Document]]:
    """The train and test documents of a task."""
    parts = divided(SOURCES[task]())
    if task == "arithmetic":
        parts["train"] = joined(parts["train"])
    parts["train"] = parts["train"][: LIMITS[task]["train"]]
    parts["test"] = unseen(parts["test"], parts["train"], whole=task == "dialogues")[: LIMITS[task]["test"]]
    return parts


def write(folder: Path, parts: dict[str, list[Document]]) -> None:
    """Writes train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in parts.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def main(out: Path) -> None:
    """Writes the texts of all tasks to `<out>/<task>/{train,test}.jsonl`."""
    for task in SOURCES:
        parts = texts(task)
        write(out / task, parts)
        print(task, {split: len(documents) for split, documents in parts.items()}, f"runs of {GRAM} words", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
