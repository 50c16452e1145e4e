"""Oracle: numbers worked out by hand."""

from __future__ import annotations

import pytest

from epmq_cli.report.numbers import closed_gap, shown


@pytest.mark.parametrize(
    ("metric", "merged", "experts", "result", "share"),
    [
        ("accuracy", 0.5, 0.9, 0.8, 0.75),
        ("spearman", -0.5, 0.5, -0.75, -0.25),
        ("perplexity", 16.0, 4.0, 8.0, 0.5),
        ("wer", 0.8, 0.2, 0.5, 0.5),
        ("accuracy", 0.9, 0.9, 0.8, None),
    ],
)
def test_the_share_of_the_gap_that_is_closed(
    metric: str, merged: float, experts: float, result: float, share: float | None
) -> None:
    found = closed_gap({"merged": merged, "experts": experts, "quantized": result}, metric)
    assert found == (None if share is None else pytest.approx(share))
    assert closed_gap({"merged": merged, "experts": experts}, metric) is None


def test_scores_as_text() -> None:
    assert [shown(0.8125, "accuracy"), shown(8.125, "perplexity"), shown(None, "wer")] == ["81.2", "8.12", ""]
