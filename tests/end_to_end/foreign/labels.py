"""The axis "labels": the class names of an expert, and those of its task's data."""

from __future__ import annotations

from dataclasses import dataclass

UNMATCHED = "names that match none of the data's labels, in no known order"
NAMES = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Labels:
    """`own`: the expert's names by class, None for LABEL_0 and so on. `listed`: the data's `labels`, None if the
    column holds class numbers. `column`: the value in the column for each of the expert's classes."""

    own: tuple[str, ...] | None
    listed: tuple[str, ...] | None
    column: tuple[str, ...]
    may_be_refused: str | None = None


LABELS = {
    "numbers": Labels(None, None, ("0", "1", "2")),
    "numbers-named": Labels(NAMES, None, ("0", "1", "2")),
    "names": Labels(NAMES, NAMES, NAMES),
    "LABEL_n": Labels(None, NAMES, NAMES),
    "permuted": Labels(("positive", "negative", "neutral"), NAMES, ("positive", "negative", "neutral")),
    "capitals": Labels(("POSITIVE", "Negative", "NEUTRAL"), NAMES, ("positive", "negative", "neutral")),
    "other-order": Labels(NAMES, ("positive", "neutral", "negative"), NAMES),
    "unmatched": Labels(
        ("happy", "angry", "calm"), NAMES, ("positive", "negative", "neutral"), may_be_refused=UNMATCHED
    ),
    "half-matched": Labels(
        ("positive", "bad", "neutral"), NAMES, ("positive", "negative", "neutral"), may_be_refused=UNMATCHED
    ),
}
