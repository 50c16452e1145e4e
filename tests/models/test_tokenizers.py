"""Oracle: tokenizers with equal and different vocabularies, in the files of current and older transformers versions."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.tokenizers import check_tokens, vocabulary
from tests.helpers.hubs import run_in
from tests.helpers.minihub import build

WORDS = {"<pad>": 0, "red": 1, "blue": 2}
UNIGRAM = [("<pad>", 0.0), ("red", -1.5), ("blue", -2.0)]
PAIRS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abc"]


class Nothing:
    infos: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def tensor(self, name: str) -> Any:
        raise NotImplementedError


def opened(path: Path) -> ModelFolder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "roberta"}')
    return ModelFolder(path, path.name, config={}, tensors=Nothing())


def words(path: Path, model: Any, *added: str) -> ModelFolder:
    """Creates a folder with a tokenizer as transformers 5 saves it."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    made.add_tokens(list(added))
    made.save_pretrained(path)
    return opened(path)


def level(vocabulary: Mapping[str, int]) -> Any:
    return models.WordLevel(dict(vocabulary), unk_token="<pad>")


def pairs(path: Path, tokens: list[str], **config: Any) -> ModelFolder:
    """Creates a folder with vocab.json, merges.txt and a tokenizer config."""
    found = opened(path)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer", **config}))
    return found


def check(base: ModelFolder, *experts: ModelFolder, processor: str = "expert") -> None:
    named = {expert.role: expert for expert in experts}
    check_tokens(base, named, dict.fromkeys(named, processor))


@pytest.mark.parametrize(
    ("model", "added", "fits"),
    [
        (level(WORDS), (), True),
        (level({**WORDS, "green": 3}), (), True),
        (level(WORDS), ("green",), True),
        (level({"<pad>": 0, "red": 1}), (), True),
        (level({"<pad>": 0, "red": 2, "blue": 1}), (), False),
        (level({"<pad>": 0, "blue": 2}), ("red",), False),
        (models.Unigram(UNIGRAM), (), True),
        (models.Unigram([UNIGRAM[0], UNIGRAM[2], UNIGRAM[1]]), (), False),
    ],
)
def test_equal_tokens_must_have_equal_ids(
    model: Any, added: tuple[str, ...], fits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = words(tmp_path / "base", level(WORDS)), words(tmp_path / "expert", model, *added)
    if fits:
        check(base, other)
    else:
        with pytest.raises(
            ModelError,
            match=r"expert \(.*\) has a different tokenizer than the base \(.*\): token 'red' has id . in its",
        ):
            check(base, other)
        check(base, other, processor="base")
        assert "suite.processor=base reads its task with the base's tokenizer" in caplog.text


def test_vocabularies_are_compared_across_file_formats(tmp_path: Path) -> None:
    base = pairs(tmp_path / "base", PAIRS)
    check(base, pairs(tmp_path / "same", PAIRS), opened(tmp_path / "none"))
    check(base, pairs(tmp_path / "longer", [*PAIRS, "d"]))
    with pytest.raises(ModelError, match=r"token 'a' has id 6 in its tokenizer and id 5 in the other"):
        check(base, pairs(tmp_path / "swapped", [*PAIRS[:5], "b", "a", "c"]))
    with pytest.raises(ModelError, match=r"token '<pad>' has id 0 in its tokenizer and id 1 in the other"):
        check(base, words(tmp_path / "other", level(WORDS)))
    (tmp_path / "bare").mkdir()  # like an adapter's folder: the base's config determines the tokenizer type
    shutil.copy(tmp_path / "swapped" / "vocab.json", tmp_path / "bare")
    shutil.copy(tmp_path / "swapped" / "merges.txt", tmp_path / "bare")
    bare = opened(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ModelError, match="token 'a' has id 6"):
        check(base, bare)


def test_experts_of_a_base_without_tokenizer_are_compared_with_each_other(tmp_path: Path) -> None:
    one, other = words(tmp_path / "one", level(WORDS)), words(tmp_path / "two", level({**WORDS, "red": 2, "blue": 1}))
    check(opened(tmp_path / "base"), one)
    with pytest.raises(ModelError, match=r"two \(.*\) has a different tokenizer than the one \(.*\): token 'red'"):
        check(opened(tmp_path / "base"), one, other)


def test_two_experts_with_one_id_for_different_tokens_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = words(tmp_path / "base", level(WORDS))
    experts = [words(tmp_path / name, level(WORDS), name) for name in ("green", "black")]
    with caplog.at_level(logging.WARNING, "epmq"):
        check(base, *experts)
    assert "black: token id 3 is 'black' in its tokenizer and 'green' in that of the green" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"vocab": 3}}', "[" * 100_000])
def test_invalid_tokenizers_are_named(text: str, tmp_path: Path) -> None:
    base = words(tmp_path / "base", level(WORDS))
    broken = words(tmp_path / "expert", level(WORDS))
    (tmp_path / "expert" / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot be read by AutoTokenizer"):
        vocabulary(tmp_path / "expert", tmp_path / "base")
    with pytest.raises(ModelError, match=r"expert: its own tokenizer cannot be read: .*; suite.processor=base reads"):
        check(base, broken)
    check(base, broken, processor="base")


def test_a_run_refuses_an_expert_with_another_tokenizer(tmp_path: Path) -> None:
    source = build(tmp_path / "hub", "llama")
    shutil.copytree(source / "first", tmp_path / "first")
    text = (source / "base" / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(
        ModelError, match="expert of task first .* has a different tokenizer than the base .*: token 'red'"
    ):
        run_in(tmp_path / "run", source, f"suite.tasks.first.expert={tmp_path / 'first'}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / "base" / name, tmp_path / "first")
    run_in(tmp_path / "run", source, f"suite.tasks.first.expert={tmp_path / 'first'}", "eval.stages=[]")
