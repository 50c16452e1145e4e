"""Tables over the vocabulary whose rows are matched by token, not by number (`suite.tokenizer`).

A token that a model lacks gets the base's row if the base has it, else the mean of the rows of the models that have it,
else zeros. Rows without a token, which pad the table, get the mean of the table's other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from epmq_cli.data.tokenizer_option import BASE, TokenSource
from epmq_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

ReadTable = Callable[[str | None], "Tensor"]
"""Reads the table of a task's expert, or of the base, with its own rows."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of the result. `vocabulary`: token -> row. `size`: the number of rows. `owned`: token -> row in each
    model, by task, in the base under None. `sources`: the sources of single tokens."""

    vocabulary: Mapping[str, int]
    size: int
    owned: Mapping[str | None, Mapping[str, int]]
    sources: Sequence[TokenSource] = field(default=())

    def aligned(self, read: ReadTable, task: str | None) -> Tensor:
        """(size, ...): a model's table in the order of the result, with all rows filled in. ModelError if a token's
        source does not have it."""
        table = read(task)
        made = torch.zeros(self.size, *table.shape[1:])
        forced = {source.token for source in self.sources if source.force}
        kept = self._shared(task, len(table))
        pairs = [(new, own) for token, (new, own) in kept.items() if token not in forced]
        new, own = (list(part) for part in zip(*pairs, strict=True)) if pairs else ([], [])
        made[new] = table[own]
        missing = [token for token in self.vocabulary if token not in kept or token in forced]
        self._fill(made, missing, read)
        rows = sorted(self.vocabulary.values())
        if len(rows) < self.size:
            rest = torch.ones(self.size, dtype=torch.bool)
            rest[rows] = False
            made[rest] = made[rows].mean(0)
        return made

    def of(self, role: str | None) -> TokenRows:
        """The rows for a source whose base is a task's expert."""
        return self if role is None else replace(self, owned={**self.owned, None: self.owned[role]})

    def _shared(self, task: str | None, rows: int) -> dict[str, tuple[int, int]]:
        """The tokens that a model has a row for: token -> its rows in the result and in the model."""
        owned = self.owned[task]
        return {token: (new, owned[token]) for token, new in self.vocabulary.items() if owned.get(token, rows) < rows}

    def _fill(self, made: Tensor, tokens: list[str], read: ReadTable) -> None:
        """Fills in the rows of tokens that the model lacks. Reads one other table at a time."""
        named = {source.token: source for source in self.sources if source.model is not None}
        open_tokens = [token for token in tokens if token not in named]
        counts = torch.zeros(self.size)
        for task in self.owned:
            wanted = [named[token] for token in tokens if token in named and named[token].model == (task or BASE)]
            if not wanted and not open_tokens:
                continue
            table = read(task)
            for source in wanted:
                made[self.vocabulary[source.token]] = table[self._row(source, task, len(table))]
            shared = self._shared(task, len(table))
            found = [token for token in open_tokens if token in shared]
            rows = [shared[token][0] for token in found]
            made[rows] += table[[shared[token][1] for token in found]]
            counts[rows] += 1
            if task is None:
                open_tokens = [token for token in open_tokens if token not in shared]
        made /= counts.clamp(min=1).view(-1, *[1] * (made.ndim - 1))

    def _row(self, source: TokenSource, task: str | None, rows: int) -> int:
        row = source.id if source.id is not None else self.owned[task].get(source.like or source.token, rows)
        if not 0 <= row < rows:
            what = f"row {source.id}" if source.id is not None else f"token {source.like or source.token!r}"
            raise ModelError(f"suite.tokenizer.tokens: {task or BASE} has no {what} for {source.token!r}; name another")
        return row
