"""Metrics of texts that a model writes, given the texts that it should write, with their standard errors."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence

from epmq_cli.evaluate.metrics import Score
from epmq_cli.evaluate.standard_errors import binomial


def words(text: str) -> list[str]:
    """The words of a text: parts between spaces, without punctuation and case, in Unicode's normal form KC."""
    letters = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in letters if unicodedata.category(letter)[0] != "P").split()


def edits(written: Sequence[str], reference: Sequence[str]) -> int:
    """Levenshtein's distance: the fewest words to insert, delete or replace to get the reference."""
    above = list(range(len(reference) + 1))
    for row, word in enumerate(written, 1):
        here = [row]
        for column, wanted in enumerate(reference, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (word != wanted)))
        above = here
    return above[-1]


def exact_match(written: Sequence[str], references: Sequence[str]) -> Score:
    """The share of texts that equal their references, apart from spaces around them."""
    share = sum(one.strip() == other.strip() for one, other in zip(written, references, strict=True)) / len(written)
    return Score(share, binomial(share, len(written)), len(written))


def word_error_rate(written: Sequence[str], references: Sequence[str]) -> Score:
    """The edits of all texts for each word of all references; may exceed 1, smaller is better."""
    pairs = [(words(one), words(other)) for one, other in zip(written, references, strict=True)]
    wrong, counts = [edits(*pair) for pair in pairs], [len(reference) for _, reference in pairs]
    total = max(1, sum(counts))
    rate = sum(wrong) / total
    if len(pairs) < 2:
        return Score(rate, None, len(pairs))
    spread = sum((own - rate * count) ** 2 for own, count in zip(wrong, counts, strict=True))  # of a ratio of sums
    return Score(rate, math.sqrt(spread * len(pairs) / (len(pairs) - 1)) / total, len(pairs))


WRITTEN: dict[str, Callable[[Sequence[str], Sequence[str]], Score]] = {
    "exact_match": exact_match,
    "wer": word_error_rate,
}
"""By metric."""
