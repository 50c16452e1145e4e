"""Oracles: invariants of drawing; joined batches equal the samples."""

import logging

import pytest
import torch

from epmq_cli.data.samples import Samples
from epmq_cli.data.sampling import batches, draw
from epmq_cli.data.suite import Task
from epmq_cli.errors import DataError


def samples(size: int) -> Samples:
    return Samples(list(range(size)), torch.arange(size))


class Numbers:
    """A source of the numbers below `size`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def load(self, split: str, count: int | None = None, seed: int | None = None) -> Samples:
        assert split == "train"
        return samples(self.size).some(count, seed)


def drawn(size: int, count: int, seed: int, name: str) -> list[int]:
    return list(draw(Task(name=name, expert="e", data=Numbers(size)), count, seed).inputs)


def test_same_seed_and_task_draw_the_same_samples() -> None:
    assert drawn(100, 10, 1, "a") == drawn(100, 10, 1, "a")
    assert drawn(100, 10, 1, "a") != drawn(100, 10, 2, "a")
    assert drawn(100, 10, 1, "a") != drawn(100, 10, 1, "b")


def test_samples_are_drawn_without_replacement_and_keep_their_labels() -> None:
    found = draw(Task(name="a", expert="e", data=Numbers(50)), 50, 0)
    assert sorted(found.inputs) == list(range(50))
    assert found.labels.tolist() == list(found.inputs)


def test_a_larger_draw_extends_a_smaller_one() -> None:
    assert drawn(50, 20, 0, "a")[:5] == drawn(50, 5, 0, "a")


def test_without_a_seed_the_first_samples_are_taken() -> None:
    assert list(samples(9).some(4, None).inputs) == [0, 1, 2, 3]
    assert list(samples(3).some(4, None).inputs) == list(samples(3).some(None, None).inputs) == [0, 1, 2]


def test_too_few_samples_are_all_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(drawn(3, 10, 0, "birds")) == 3
    assert "task birds: calibration uses all 3 training samples, fewer than calib.samples=10" in caplog.text


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="task birds has no training samples"):
        drawn(0, 10, 0, "birds")


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_hold_all_samples_in_order(size: int) -> None:
    found = list(batches(samples(7), lambda items: {"x": torch.tensor(items)}, size, torch.device("cpu")))
    assert torch.cat([batch["x"] for batch in found]).tolist() == list(range(7))
    assert max(len(batch["x"]) for batch in found) == min(size, 7)
