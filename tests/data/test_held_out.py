"""Oracle: the numbers of the samples in the order of all batches."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.data.held_out import check_enough, filled, hold_out, members
from epmq_cli.errors import DataError
from epmq_cli.runtime import distributed

SIZES = [7, 7, 7, 7, 3]


def test_every_fifth_sample_is_held_out() -> None:
    held, fitted = (torch.cat([*members(subset, SIZES)]) for subset in ("held", "fitted"))  # type: ignore[arg-type,list-item]
    assert held.nonzero().flatten().tolist() == [4, 9, 14, 19, 24, 29]
    assert torch.equal(fitted, ~held)
    assert members("all", SIZES) == [None] * 5


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_hold_out_the_samples_of_one(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = members("held", SIZES)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(distributed, "broadcast", lambda _: SIZES[0])
    found = {}
    for number in range(processes):
        monkeypatch.setenv("RANK", str(number))
        own = [*range(len(SIZES))][number::processes]
        found |= dict(zip(own, members("held", [SIZES[index] for index in own]), strict=True))
    torch.testing.assert_close([found[index] for index in range(len(SIZES))], wanted)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_batches_are_split(size: int) -> None:
    rows = torch.arange(23)
    fitted, held = map(filled, hold_out({"task": [{"x": part, "y": 2 * part} for part in rows.split(size)]}))
    held_out = torch.cat([batch["x"] for batch in held["task"]])
    assert torch.equal(held_out, torch.tensor([4, 9, 14, 19]))
    assert sorted(torch.cat([batch["x"] for batch in fitted["task"]] + [held_out]).tolist()) == rows.tolist()
    for batch in (*fitted["task"], *held["task"]):
        assert len(batch["x"]) > 0
        assert torch.equal(batch["y"], 2 * batch["x"])


def test_each_task_is_split_separately() -> None:
    fitted, held = map(
        filled, hold_out({task: [{"x": torch.arange(size)}] for task, size in (("one", 12), ("other", 11))})
    )
    assert [batch["x"].tolist() for batch in held["other"]] == [[4, 9]]
    assert [batch["x"].tolist() for batch in fitted["one"]] == [[0, 1, 2, 3, 5, 6, 7, 8, 10, 11]]


def test_a_task_needs_a_sample_to_hold_out() -> None:
    check_enough("first", [{"x": torch.zeros(3)}, {"x": torch.zeros(2)}], "merge.fallback=true")
    message = "task first has 4 calibration samples, but merge.fallback=true needs 5, because one in 5 is held out; "
    with pytest.raises(DataError, match=message):
        check_enough("first", [{"x": torch.zeros(3)}, {"x": torch.zeros(1)}], "merge.fallback=true")
