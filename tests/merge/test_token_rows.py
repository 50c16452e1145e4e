"""Oracles: rows by hand, and models of transformers with tokenizers whose tokens differ in number and order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from torch import Tensor

from epmq_cli.data.suite import Suite
from epmq_cli.data.tokenizer_option import TokenSource, tokenizer_option
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.merge.token_rows import TokenRows
from epmq_cli.pipeline.job import make_job
from tests.commands.test_merge import merged
from tests.conftest import write_suite
from tests.helpers.hubs import config
from tests.helpers.minihub import SIZE

OWNED: dict[str | None, dict[str, int]] = {
    None: {"a": 0, "b": 1, "c": 2},
    "x": {"b": 0, "a": 1, "d": 2, "lost": 9},
    "y": {"d": 1, "e": 0, "a": 2},
}
TABLES: dict[str | None, Tensor] = {
    None: torch.tensor([[1.0], [2.0], [3.0], [99.0]]),
    "x": torch.tensor([[20.0], [10.0], [40.0]]),
    "y": torch.tensor([[500.0], [400.0], [100.0]]),
}
UNION = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


def aligned(task: str | None, vocabulary: dict[str, int] = UNION, size: int = 5, *sources: TokenSource) -> list[float]:
    return TokenRows(vocabulary, size, OWNED, sources).aligned(TABLES.__getitem__, task).flatten().tolist()


def test_rows_are_matched_by_token() -> None:
    """d is the mean of the two experts' for the base; e is that of y for all; b and c of y are the base's."""
    assert aligned(None) == [1, 2, 3, 220, 500]
    assert aligned("x") == [10, 20, 3, 40, 500]
    assert aligned("y") == [100, 2, 3, 400, 500]
    assert aligned("x", {"c": 0, "a": 1}, 2) == [3, 10]


def test_rows_without_a_token_get_the_mean_and_unknown_tokens_zeros() -> None:
    assert aligned("x", {"a": 0, "b": 2, "lost": 1}, 4) == [10, 0, 20, 10]


def test_sources_of_single_tokens() -> None:
    assert aligned("x", UNION, 5, TokenSource("e", "base", like="b")) == [10, 20, 3, 40, 2]
    assert aligned("x", UNION, 5, TokenSource("a", "y", force=True)) == [100, 20, 3, 40, 500]
    assert aligned("x", UNION, 5, TokenSource("a", "zero", force=True)) == [0, 20, 3, 40, 500]
    assert aligned("y", UNION, 5, TokenSource("b", "x", id=2)) == [100, 40, 3, 400, 500]
    with pytest.raises(ModelError, match=r"suite.tokenizer.tokens: x has no token 'c' for 'c'; name another"):
        aligned("y", UNION, 5, TokenSource("c", "x"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("unoin", r"suite.tokenizer.source must be one of base, union, x, got 'unoin'"),
        ({"sorce": "base"}, r"suite.tokenizer has no option 'sorce', .* did you mean source\?"),
        ({"tokens": [{"token": "a", "modl": "x"}]}, r"suite.tokenizer.tokens\[0\] has no option 'modl'"),
        ({"tokens": [{"token": "a", "model": "z"}]}, r"tokens\[0\].model must be one of base, zero, x, got 'z'"),
        ({"tokens": [{"token": "a", "like": "b"}]}, r"tokens\[0\] takes like or id, and the model that has it"),
        ({"tokens": "a"}, r"suite.tokenizer.tokens must be a list of \{token, model\}, got 'a'"),
        ({"pad_to_multiple_of": 0}, r"suite.tokenizer.pad_to_multiple_of must be a whole number"),
    ],
)
def test_wrong_options_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer_option(value, ["x"])


WORDS: dict[str, list[str]] = {
    "base": ["<pad>", "<s>", "</s>", "<unk>", "red", "green", "blue"],
    "first": ["<unk>", "green", "red", "<s>", "</s>", "<pad>", "blue", "pink"],
    "second": ["<pad>", "<s>", "</s>", "<unk>", "red", "green", "blue"],
}
ADDED = {"first": [], "base": [], "second": ["<|im_start|>", "<|im_end|>"]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas with random weights: `first` has other ids and one more word, `second` two more special tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    for seed, (name, words) in enumerate(WORDS.items()):
        made = Tokenizer(kinds.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=made, **special)
        tokenizer.add_tokens(ADDED[name], special_tokens=True)
        tokenizer.chat_template = None if name == "base" else f"{{{{ messages }}}}{'!' * (name == 'first')}"
        tokenizer.save_pretrained(folder / name)
        ids = {
            f"{key}_token_id": words.index(word) for key, word in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
        }
        sizes = {**SIZE, "vocab_size": len(words) + len(ADDED[name]), "num_key_value_heads": 2}
        torch.manual_seed(seed)
        t.LlamaForCausalLM(t.LlamaConfig(**sizes, **ids)).save_pretrained(folder / name)
    data = {"_target_": "epmq_cli.data.table.Table", "train": "none.tsv", "test": "none.tsv"}
    tasks = {name: {"expert": str(folder / name), "data": data, "metric": "perplexity"} for name in ("first", "second")}
    write_suite(folder, {"family": "causal_lm", "base": str(folder / "base"), "tasks": tasks})
    return folder


def table(folder: Path) -> dict[str, Tensor]:
    """The embedding of each token."""
    rows = t.AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    return {token: rows[row] for token, row in t.AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def test_the_union_has_all_tokens_with_their_own_embeddings(hub: Path, tmp_path: Path) -> None:
    option = '{source: union, tokens: [{token: "<|im_end|>", model: base, like: red}], pad_to_multiple_of: 4}'
    checkpoint = merged(hub, tmp_path / "run", "merge=average", f"++suite.tokenizer={option}")
    base, first, second, found = (table(folder) for folder in (*(hub / name for name in WORDS), checkpoint))
    assert found.keys() == {*WORDS["base"], "pink", *ADDED["second"]}
    for word in WORDS["base"]:
        torch.testing.assert_close(found[word], (first[word] + second[word]) / 2)
    torch.testing.assert_close(found["pink"], first["pink"])
    torch.testing.assert_close(found["<|im_start|>"], second["<|im_start|>"])
    torch.testing.assert_close(found["<|im_end|>"], (base["red"] + second["<|im_end|>"]) / 2)
    model = t.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 12
    written = t.AutoTokenizer.from_pretrained(checkpoint)
    assert written("red pink <|im_end|> green")["input_ids"] == [
        written.get_vocab()[word] for word in ("red", "pink", "<|im_end|>", "green")
    ]


def test_the_bases_tokenizer_takes_the_experts_rows_by_token(hub: Path, tmp_path: Path) -> None:
    checkpoint = merged(hub, tmp_path / "run", "merge=average", "++suite.tokenizer=base")
    first, second, found = (table(folder) for folder in (hub / "first", hub / "second", checkpoint))
    assert found.keys() == table(hub / "base").keys()
    for word in found:
        torch.testing.assert_close(found[word], (first[word] + second[word]) / 2)


def test_an_experts_tokenizer_moves_the_ids_of_special_tokens(hub: Path, tmp_path: Path) -> None:
    option = "++suite.tokenizer={source: first, chat_template: auto}"
    checkpoint = merged(hub, tmp_path / "run", "merge=task_arithmetic", "merge.scale=1", option)
    base, first, second, found = (table(folder) for folder in (*(hub / name for name in WORDS), checkpoint))
    assert found.keys() == first.keys()
    torch.testing.assert_close(found["red"], first["red"] + second["red"] - base["red"])
    torch.testing.assert_close(found["pink"], first["pink"])
    stored = json.loads((checkpoint / "config.json").read_text())
    assert [stored[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, 4, 5]
    tokenizer = t.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("blue red")["input_ids"] == [6, 2]
    assert tokenizer.chat_template == "{{ messages }}!"


def test_without_the_option_the_error_stays_and_runs_refuse_it(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has a different tokenizer|is .* in the expert"):
        merged(hub, tmp_path / "run", "merge=average", "+suite.vocabulary=pad")
    with pytest.raises(ConfigError, match="suite.tokenizer makes a new vocabulary, which epmq run does not do"):
        make_job(config(hub, "++suite.tokenizer=union"))
    assert Suite("x", "bert", "base", {}, {"a": "b"}, {"data": _Source()}).merged_tokenizer is None


class _Source:
    def load(self) -> None: ...
