"""Oracles: what a call gives when there is room; sizes halved by hand; the system's own limit of memory."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.data.batching import split
from epmq_cli.data.microbatch import MicroBatcher, joined
from epmq_cli.errors import ConfigError, RunError, lacks_memory
from tests.faults.driver import forked

BATCH = {"ids": torch.arange(14).reshape(7, 2), "mask": torch.arange(7)}


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")


def micro(most: int) -> MicroBatcher:
    return MicroBatcher(most, "thinking", "think less")


@pytest.mark.parametrize("samples", range(1, 9))
def test_parts_of_a_batch_are_the_batch(samples: int) -> None:
    parts = split(BATCH, samples)
    assert {len(part["mask"]) for part in parts[:-1]} <= {samples}
    assert len(parts[-1]["mask"]) <= samples
    for name, tensor in BATCH.items():
        assert torch.equal(joined([part[name] for part in parts]), tensor)
    assert samples < 7 or parts[0] is BATCH


@pytest.mark.parametrize("fits", range(1, 9))
def test_samples_at_a_time_are_halved_until_there_is_room_and_stay_so(fits: int) -> None:
    found, tried = micro(32), []

    def call(part: dict[str, Tensor]) -> Tensor:
        tried.append(len(part["mask"]))
        if len(part["mask"]) > fits:
            raise full()
        return part["ids"] * 2

    for _ in range(2):
        assert torch.equal(found.rows(call, BATCH), BATCH["ids"] * 2)
    assert [size for size in tried if size > fits] == [size for size in (7, 3) if size > fits]
    assert found.halved == sum(size > fits for size in (7, 3))
    assert found.most == 32


def test_nothing_of_a_call_that_failed_is_held_when_the_next_begins() -> None:
    found, made = micro(2), []

    class Node:  # in a cycle, as calls of a model may be
        def __init__(self) -> None:
            self.own, self.tensor = self, torch.ones(4)

    def call(samples: int) -> int:
        node = Node()
        assert all(kept() is None for kept in made)
        made.append(weakref.ref(node.tensor))
        if samples > 1:
            raise full()
        return samples

    restored = []
    assert found.run(call, lambda: restored.append(all(kept() is None for kept in made))) == 1
    assert restored == [True]


def test_without_room_for_one_sample_it_is_said_what_to_do() -> None:
    found, tried = micro(5), []

    def call(samples: int) -> None:
        tried.append(samples)
        raise full()

    with pytest.raises(
        RunError, match="^there is not enough memory for thinking, even with one sample at a time; think less$"
    ):
        found.run(call)
    assert tried == [5, 2, 1]


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes"), ConfigError("no"), OSError(28)])
def test_other_errors_are_nothing_of_this(error: Exception) -> None:
    calls = []

    def call(samples: int) -> None:
        calls.append(samples)
        raise error

    with pytest.raises(type(error)):
        micro(4).run(call)
    assert calls == [4]
    assert not lacks_memory(error)


def test_what_must_not_be_retried_is_not() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatcher(4, "thinking", "think less", retries=False).run(lambda samples: (_ for _ in ()).throw(full()))


@pytest.mark.parametrize(
    "error",
    [
        full(),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_ways_to_say_that_there_is_no_room(error: Exception) -> None:
    assert lacks_memory(error)
    assert micro(2).run(lambda samples: samples if samples == 1 else (_ for _ in ()).throw(error)) == 1


def test_memory_of_the_machine_that_does_not_suffice(tmp_path: Path) -> None:
    """A process that may have 1 GB more, of which each sample takes 100 MB."""

    def body() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000, resource.RLIM_INFINITY))
        found = micro(32)
        kept = found.run(lambda samples: torch.ones(samples, 25_000_000))
        assert (len(kept), found.halved) == (8, 2)

    assert forked(body) == 0
