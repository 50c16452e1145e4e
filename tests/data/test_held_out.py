"""Oracle: the numbers of the samples in the order of all batches."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.data.held_out import check_enough, members
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


def test_a_task_needs_a_sample_to_hold_out() -> None:
    check_enough("first", [{"x": torch.zeros(3)}, {"x": torch.zeros(2)}], "merge.fallback=true")
    message = "task first has 4 calibration samples, but merge.fallback=true needs 5, because one in 5 is held out; "
    with pytest.raises(DataError, match=message):
        check_enough("first", [{"x": torch.zeros(3)}, {"x": torch.zeros(1)}], "merge.fallback=true")
