"""Oracle: a tensor is equal before and after it is offloaded, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.calibrate.activations.store import HOLES, ActivationStore


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_tensors_beyond_the_budget_go_to_files_and_come_back_equal(tmp_path: Path) -> None:
    given = [rows(100, seed) for seed in range(4)]
    held = [tensor.clone() for tensor in given]
    with ActivationStore(1000, tmp_path) as store:
        parcels = [store.offload([tensor]) for tensor in held]
        assert store.used == 800
        assert [tensor.untyped_storage().nbytes() for tensor in held] == [400, 400, 0, 0]
        assert len(list(tmp_path.glob(".activations-*/*"))) == 2
        for handle, tensor, wanted in zip(parcels, held, given, strict=True):
            handle.load()
            assert torch.equal(tensor, wanted)
        assert store.used == 0
        assert not list(tmp_path.glob(".activations-*/*"))
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_stored_once(tmp_path: Path) -> None:
    whole = rows(100, 0)
    wanted, half = whole.clone(), whole[50:].view(5, 10)
    for budget, size in ((1000, 400), (0, 0)):
        with ActivationStore(budget, tmp_path) as store:
            handle = store.offload([whole, half, whole])
            assert store.used == size
            assert store.spilled == 400 - size
            handle.load()
        assert torch.equal(whole, wanted)
        assert torch.equal(half.flatten(), wanted[50:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_type_and_layout_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (10 * rows(12, 0)).to(dtype).view(3, 4).T
    wanted = tensor.clone()
    with ActivationStore(0, tmp_path) as store:
        handle = store.offload([tensor, torch.empty(0)])
        assert tensor.untyped_storage().nbytes() == 0
        handle.load()
    assert torch.equal(tensor, wanted)


def test_the_memory_of_the_whole_process_counts(tmp_path: Path) -> None:
    """The budget is on top of the memory at the start. When the second tensor arrives, other memory has used it up;
    when the third arrives, it has not."""
    had = iter([1 << 30, 1 << 30, (1 << 30) + 2000, (1 << 30) + 2000, (1 << 30) + 1000])
    with ActivationStore(1000, tmp_path, lambda: next(had)) as store:
        tensors = [rows(10, seed) for seed in range(3)]
        for tensor in tensors:
            store.offload([tensor])
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [40, 0, 40]
        assert (store.used, store.spilled) == (80, 40)


def test_freed_memory_that_the_allocator_keeps_does_not_count(tmp_path: Path) -> None:
    had = iter([0, HOLES + 2000, 500, HOLES, HOLES + 600, 700])
    with ActivationStore(1000, tmp_path, lambda: next(had)) as store:
        for seed in range(3):
            store.offload([rows(10, seed)])
        assert (store.used, store.spilled) == (80, 40)  # the second finds too little to trim
    assert next(had, None) is None


def test_held_bytes_count_until_they_are_released(tmp_path: Path) -> None:
    with ActivationStore(100, tmp_path) as store:
        assert store.hold(70)
        assert not store.hold(40)
        store.offload([rows(10, 0)])
        assert (store.used, store.spilled) == (70, 40)
        store.release(70)
        store.offload([rows(10, 1)])
        assert (store.used, store.spilled) == (40, 40)
