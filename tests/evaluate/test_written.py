"""Oracles: Levenshtein's distance by recursion, and counts by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest

from epmq_cli.evaluate.written import edits, exact_match, word_error_rate, words


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    if not one or not other:
        return len(one) + len(other)
    changed = distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, distance(one[1:], other) + 1, distance(one, other[1:]) + 1)


def test_edits_are_levenshteins_distance() -> None:
    texts = ["", "a", "b", "ab", "ba", "abc", "cab", "aabb", "bcba"]
    for one, other in product(texts, texts):
        assert edits(one, other) == distance(one, other)


def test_words_have_neither_case_nor_punctuation() -> None:
    assert words(" Don't stop, \uff21!  ok\n") == ["dont", "stop", "a", "ok"]


def test_rates_count_the_words_of_all_references() -> None:
    score = word_error_rate(["a b c", "x y"], ["A b d.", "x"])
    assert score.value == 2 / 4
    assert score.samples == 2
    spread = (1 - 0.5 * 3) ** 2 + (1 - 0.5 * 1) ** 2
    assert score.error == pytest.approx(math.sqrt(2 * spread) / 4)
    assert word_error_rate(["a b"], ["c"]).value == 2
    assert word_error_rate(["a"], ["c"]).error is None


def test_equal_texts_match_apart_from_spaces() -> None:
    score = exact_match([" a b ", "A", "c", "d"], ["a b", "a", "c", "e"])
    assert score == (0.5, pytest.approx(0.25), 4)
