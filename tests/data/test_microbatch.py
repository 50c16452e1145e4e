"""Oracles: the result of a call with enough memory; sizes halved by hand; the memory limit of the system."""

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
def test_the_parts_of_a_batch_join_to_the_batch(samples: int) -> None:
    parts = split(BATCH, samples)
    assert {len(part["mask"]) for part in parts[:-1]} <= {samples}
    assert len(parts[-1]["mask"]) <= samples
    for name, tensor in BATCH.items():
        assert torch.equal(joined([part[name] for part in parts]), tensor)
    assert samples < 7 or parts[0] is BATCH


@pytest.mark.parametrize("fits", range(1, 9))
def test_the_micro_batch_is_halved_on_out_of_memory_and_stays_small(fits: int) -> None:
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


def test_tensors_of_a_failed_call_are_freed_before_the_next() -> None:
    found, made = micro(2), []

    class Node:  # a reference cycle, as model calls may create
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


def test_out_of_memory_with_one_sample_names_the_remedy() -> None:
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
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    calls = []

    def call(samples: int) -> None:
        calls.append(samples)
        raise error

    with pytest.raises(type(error)):
        micro(4).run(call)
    assert calls == [4]
    assert not lacks_memory(error)


def test_calls_are_not_retried_if_retries_are_off() -> None:
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
def test_every_kind_of_out_of_memory_error_is_recognised(error: Exception) -> None:
    assert lacks_memory(error)
    assert micro(2).run(lambda samples: samples if samples == 1 else (_ for _ in ()).throw(error)) == 1


def test_out_of_memory_on_the_cpu(tmp_path: Path) -> None:
    """The process may allocate 1 GB more; each sample takes 100 MB."""

    def body() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000, resource.RLIM_INFINITY))
        found = micro(32)
        kept = found.run(lambda samples: torch.ones(samples, 25_000_000))
        assert (len(kept), found.halved) == (8, 2)

    assert forked(body) == 0
