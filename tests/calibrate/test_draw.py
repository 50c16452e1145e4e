"""Oracles: invariants of drawing; batches joined give the samples back."""

import logging

import pytest
import torch

from epmq_cli.calibrate.draw import batches, draw
from epmq_cli.data.samples import Samples
from epmq_cli.errors import DataError


def samples(count: int) -> Samples:
    return Samples(list(range(count)), torch.arange(count))


def test_same_seed_and_task_draw_the_same_samples() -> None:
    assert draw(samples(100), 10, 1, "a").inputs == draw(samples(100), 10, 1, "a").inputs
    assert draw(samples(100), 10, 1, "a").inputs != draw(samples(100), 10, 2, "a").inputs
    assert draw(samples(100), 10, 1, "a").inputs != draw(samples(100), 10, 1, "b").inputs


def test_samples_are_drawn_without_replacement_and_keep_their_labels() -> None:
    drawn = draw(samples(50), 50, 0, "a")
    assert sorted(drawn.inputs) == list(range(50))
    assert drawn.labels.tolist() == list(drawn.inputs)


def test_more_samples_extend_fewer() -> None:
    assert draw(samples(50), 20, 0, "a").inputs[:5] == draw(samples(50), 5, 0, "a").inputs


def test_too_few_samples_are_all_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(draw(samples(3), 10, 0, "birds")) == 3
    assert "task birds: calibrating on all 3 training samples, 10 were asked for" in caplog.text


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="task birds has no training samples"):
        draw(samples(0), 10, 0, "birds")


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_hold_all_samples_in_order(size: int) -> None:
    found = list(batches(samples(7), lambda items: {"x": torch.tensor(items)}, size, torch.device("cpu")))
    assert torch.cat([batch["x"] for batch in found]).tolist() == list(range(7))
    assert max(len(batch["x"]) for batch in found) == min(size, 7)
