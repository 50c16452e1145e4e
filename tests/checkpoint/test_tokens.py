"""Oracle: tokenizers of the same and of another vocabulary, written by hand and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.checkpoint.reader import ModelFolder
from epmq_cli.checkpoint.tokens import check_tokens, numbers
from epmq_cli.errors import ModelError
from tests.hubs import run_in
from tests.minihub import build

WORDS = {"<pad>": 0, "red": 1, "blue": 2}


def folder(path: Path, tokenizer: Any = None, words: str | None = None) -> ModelFolder:
    path.mkdir()
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer))
    if words is not None:
        (path / "vocab.txt").write_text(words)
    return ModelFolder(path, path.name, config={}, tensors=Nothing())


class Nothing:
    infos: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def tensor(self, name: str) -> Any:
        raise NotImplementedError


def words(vocabulary: Any, *added: tuple[str, int]) -> dict[str, Any]:
    tokens = [{"content": content, "id": number} for content, number in added]
    return {"model": {"vocab": vocabulary}, "added_tokens": tokens}


@pytest.mark.parametrize(
    ("expert", "fits"),
    [
        (words(WORDS), True),
        ({**words(WORDS), "truncation": {"max_length": 9}}, True),
        (words({**WORDS, "green": 3}), True),
        (words({"<pad>": 0, "red": 1}), True),
        (words({"<pad>": 0, "red": 2, "blue": 1}), False),
        (words(WORDS, ("red", 7)), False),
        (words([["<pad>", 0.0], ["red", -1.5], ["blue", -2.0]]), True),
        (words([["<pad>", 0.0], ["blue", -1.5], ["red", -2.0]]), False),
    ],
)
def test_the_same_tokens_must_have_the_same_numbers(expert: Any, fits: bool, tmp_path: Path) -> None:
    base, other = folder(tmp_path / "base", words(WORDS)), folder(tmp_path / "expert", expert)
    if fits:
        check_tokens(base, other)
    else:
        with pytest.raises(
            ModelError, match=r"expert \(.*\) has another tokenizer than the base .*: token 'red' is . in"
        ):
            check_tokens(base, other)


def test_lists_of_words_are_compared_too_and_what_one_lacks_is_not(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", words="a\nb\n")
    check_tokens(base, folder(tmp_path / "longer", words="a\nb\nc\n"))
    check_tokens(base, folder(tmp_path / "none"))
    check_tokens(base, folder(tmp_path / "other", words(WORDS)))
    with pytest.raises(ModelError, match="token 'a' is 1 in its vocab.txt and 0 in the base's"):
        check_tokens(base, folder(tmp_path / "swapped", words="b\na\n"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"vocab": 3}}', "[" * 100_000, '{"model": {"vocab": [1]}}']
)
def test_what_is_no_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    folder(tmp_path / "base", text)
    with pytest.raises(ModelError, match=r"base: .*tokenizer.json cannot be read as a tokenizer"):
        numbers(tmp_path / "base" / "tokenizer.json", "base")


def test_a_run_refuses_an_expert_of_another_tokenizer(tmp_path: Path) -> None:
    source = build(tmp_path / "hub", "llama")
    shutil.copytree(source / "first", tmp_path / "first")
    text = (source / "base" / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ModelError, match="expert of task first .* has another tokenizer than the base .*: token 'red'"):
        run_in(tmp_path / "run", source, f"suite.tasks.first.expert={tmp_path / 'first'}")
    (tmp_path / "first" / "tokenizer.json").write_text(text)
    run_in(tmp_path / "run", source, f"suite.tasks.first.expert={tmp_path / 'first'}", "eval.stages=[]")
