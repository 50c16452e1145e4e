"""Running text for language models, from local files or from the hub, and the sequences that are cut out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from epmq_cli.data.columns import check_text
from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.table import KINDS, read_rows
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.places import check_permitted, expanded


@dataclass(frozen=True)
class Documents:
    """Local files `train` and `test`: .txt, one document; or .jsonl, .parquet, .csv or .tsv, a document a row in the
    column `text`. They have no labels.
    """

    train: str
    test: str
    text: str = "text"

    def __post_init__(self) -> None:
        for path in (self.train, self.test):
            if Path(path).suffix not in (".txt", *KINDS):
                raise ConfigError(f"data.train and data.test must end in .txt, {', '.join(KINDS)}, got {path}")

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """All documents of the split, or `count` of them: the first, or by a seed."""
        path = expanded(self.train if split == "train" else self.test)
        if path.suffix != ".txt":
            rows = enumerate(read_rows(path, (self.text,)), 1)
            return running([check_text(str(row[self.text]), f"{path}, row {i}") for i, row in rows], count, seed)
        check_permitted(path, DataError)
        try:
            return running([path.read_text(encoding="utf-8")], count, seed)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text in UTF-8 ({error})") from error


def running(texts: Sequence[str], count: int | None, seed: int | None) -> Samples:
    """Documents as samples."""
    return Samples(texts).some(count, seed)


def token_blocks(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """`count` sequences (count, length) that start anywhere in `ids` (tokens,), drawn by the seed.

    DataError where there are fewer than `length` tokens.
    """
    if len(ids) < length:
        raise DataError(
            f"calibration needs at least max_length={length} tokens of text, got {len(ids)}; give more, or a smaller "
            "max_length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]
