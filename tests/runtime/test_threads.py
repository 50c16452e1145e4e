"""Oracle: the same work in a loop."""

from __future__ import annotations

import threading

import pytest
import torch

from epmq_cli.errors import ModelError
from epmq_cli.runtime import threads


@pytest.fixture(params=[1, 3])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "threads", lambda: request.param)
    found: int = request.param
    return found


def test_results_are_in_the_order_of_the_items(count: int) -> None:
    assert threads.spread(lambda item: item * item, iter(range(1000))) == [item * item for item in range(1000)]


def test_torch_uses_one_thread_inside_and_as_many_as_before_outside(count: int) -> None:
    before = torch.get_num_threads()
    meeting = threading.Barrier(count, timeout=60)

    def work(item: int) -> tuple[int, int]:
        meeting.wait()  # a barrier for all threads
        return threading.get_ident(), torch.get_num_threads()

    found = threads.spread(work, range(count))
    assert len(set(found)) == count
    assert count == 1 or {alone for _, alone in found} == {1}
    assert torch.get_num_threads() == before


def test_an_exception_in_a_thread_is_raised(count: int) -> None:
    def work(item: int) -> None:
        if item == 5:
            raise ModelError("expert of task first: it holds a NaN")

    with pytest.raises(ModelError, match="holds a NaN"):
        threads.spread(work, range(10))


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_from_outside_can_be_written_inside(inference: bool, count: int) -> None:
    with torch.inference_mode(inference):
        found = torch.zeros(10)
        threads.spread(lambda part: part.add_(1), torch.split(found, 2))
        assert found.tolist() == [1] * 10
        assert found.is_inference() is inference
