"""Running text for language models from local files, and the sequences that calibration cuts out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.rows import SMALL, Row, decoded, read_first
from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.table import KINDS, read_rows
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.runtime.paths import check_permitted, expanded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Local files `train` and `test`: .txt for one document; .jsonl, .json, .parquet, .csv or .tsv for one per row.

    `text`: the column of the document, which is a text or a conversation; null for the usual columns (`layouts.py`). A
    conversation is a list of messages {role, content} or {from, value}; the tokenizer's chat template turns it into
    text. `prompt`: a text with {column} placeholders, instead of `text`. Documents have no labels.
    """

    train: str
    test: str
    text: str | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        for path in (self.train, self.test):
            if Path(path).suffix.lower() not in (".txt", *KINDS):
                raise ConfigError(f"data.train and data.test must end in .txt, {', '.join(KINDS)}, got {path}")
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """The columns of a document; ConfigError if they do not make one."""
        return columns("text", self.text, self.prompt, None, None, False)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """All documents of the split, or `count` of them: the first ones, or drawn by a seed."""
        path = expanded(self.train if split == "train" else self.test)
        if path.suffix.lower() == ".txt":
            return running([_read_text(path)], count, seed)
        return running(self._documents(path), count, seed)

    def check_first(self, split: Split) -> int:
        """See CheckedSource. Never 0: how much text is too little is known when it is split into tokens."""
        path = expanded(self.train if split == "train" else self.test)
        if path.suffix.lower() != ".txt":
            self._documents(path, read_first)
        elif not path.is_file() or path.stat().st_size <= SMALL:
            _read_text(path)
        return 1

    def _documents(self, path: Path, read: Callable[[Path], list[Row]] | None = None) -> list[Any]:
        rows = read_rows(path, self.columns, read)
        return self.columns.of(rows[0], str(path)).texts(rows, str(path)) if rows else []


def _read_text(path: Path) -> str:
    check_permitted(path, DataError)
    try:
        text = decoded(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8 ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def running(texts: Sequence[Any], count: int | None, seed: int | None) -> Samples:
    """Documents as samples."""
    return Samples(texts).some(count, seed)


def token_blocks(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """`count` sequences (count, length) that start at random places of `ids` (tokens,), drawn by the seed.

    DataError if there are fewer than `length` tokens.
    """
    if len(ids) < length:
        raise DataError(
            f"calibration needs at least max_length={length} tokens of text, got {len(ids)}; add text, or lower "
            "max_length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]
