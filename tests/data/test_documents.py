"""Oracles: the written texts, and sequences that occur in their tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epmq_cli.data.documents import Documents, token_blocks
from epmq_cli.errors import ConfigError, DataError

TEXTS = ["one\ntwo", "three", "", "fünf"]


def source(folder: Path, kind: str) -> Documents:
    if kind == ".txt":
        (folder / "t.txt").write_text(TEXTS[0], encoding="utf-8")
    else:
        (folder / "t.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS), encoding="utf-8")
    return Documents(str(folder / f"t{kind}"), str(folder / "none.txt"), "body")


def test_documents_are_the_rows_of_a_table_or_a_whole_text(tmp_path: Path) -> None:
    assert list(source(tmp_path, ".jsonl").load("train").inputs) == TEXTS
    assert list(source(tmp_path, ".txt").load("train").inputs) == TEXTS[:1]


def test_a_count_takes_the_first_documents_or_a_seeded_draw(tmp_path: Path) -> None:
    data = source(tmp_path, ".jsonl")
    assert list(data.load("train", 2).inputs) == TEXTS[:2]
    draws = [tuple(data.load("train", 3, seed).inputs) for seed in range(8)]
    assert all(len(set(draw)) == 3 and set(draw) <= set(TEXTS) for draw in draws)
    assert len(set(draws)) > 1
    assert draws == [tuple(data.load("train", 3, seed).inputs) for seed in range(8)]


def test_missing_files_and_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt cannot be read as text"):
        source(tmp_path, ".txt").load("test")
    with pytest.raises(ConfigError, match=r"must end in .txt, .tsv, .csv, .jsonl, .json, .parquet, got a.pdf"):
        Documents("a.pdf", "a.txt")


def test_the_seed_chooses_sequences_from_the_tokens() -> None:
    ids = torch.arange(50)
    blocks = token_blocks(ids, 7, 30, 0)
    assert blocks.shape == (30, 7)
    assert torch.equal(blocks - blocks[:, :1], torch.arange(7).expand(30, 7))
    assert len(set(blocks[:, 0].tolist())) > 10
    assert torch.equal(blocks, token_blocks(ids, 7, 30, 0))
    assert not torch.equal(blocks, token_blocks(ids, 7, 30, 1))
    assert torch.equal(token_blocks(ids, 50, 2, 0), ids.expand(2, 50))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"needs at least max_length=51 tokens of text, got 50"):
        token_blocks(torch.arange(50), 51, 1, 0)
