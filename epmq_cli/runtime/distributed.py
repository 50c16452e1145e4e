"""The processes of a run that torchrun starts. Each one reads its share of the calibration samples, sums are reduced
over all processes, and the first one writes and scores.

Without torchrun there is one process, and every function here is a no-op.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from epmq_cli.errors import ConfigError, RunError, first_line, lacks_memory, literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Work

Item = TypeVar("Item")

VARIABLES = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets: each process's position, and the address where the processes connect."""
PATIENCE = timedelta(days=7)  # the other processes wait while the first one scores


def rank() -> int:
    """This process's rank, from 0."""
    return _variable("RANK") if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes."""
    return _variable("WORLD_SIZE")


def local_rank() -> int:
    """This process's rank among those on the same machine, from 0."""
    return _variable("LOCAL_RANK") if world_size() > 1 else 0


def _variable(name: str) -> int:
    """The value of a variable, or its default if it is not a number, which `check_environment` refuses."""
    value = os.environ.get(name, "")
    return int(value if value.isdecimal() else VARIABLES[name])


def check_environment(command: str) -> None:
    """ConfigError for values that torchrun never sets, and for several processes with any command but run."""
    values = {name: os.environ.get(name, usual) for name, usual in VARIABLES.items()}
    settings = " ".join(f"{name}={literal(value)}" for name, value in values.items())
    size, *numbers = [int(value) if value.isdecimal() else -1 for value in values.values()]
    if size < 1 or min(numbers) < 0 or (size > 1 and max(numbers) >= size):
        raise ConfigError(f"torchrun never sets {settings}; start the processes with it, or unset these variables")
    missing = [name for name in PLACE if not os.environ.get(name)]
    if size > 1 and missing:
        raise ConfigError(f"{settings} is set without {missing[0]}; start the processes with torchrun")
    if size > 1 and command != "run":
        raise ConfigError(f"epmq {command} runs in one process; start it without torchrun")


def is_main() -> bool:
    """Whether this process writes and scores."""
    return rank() == 0


def init(device: torch.device) -> None:
    """Connects to the other processes, once, and selects this process's device."""
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1:
        return
    if device.type == "cuda" and device.index != local_rank():
        raise RunError(f"{world_size()} processes cannot share device={device}; with device=cuda each takes its own")
    if not distributed.is_initialized():
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise RunError(
                f"the processes of this run cannot connect to each other ({reason}); start them with torchrun"
            ) from error
        atexit.register(distributed.destroy_process_group)


@contextmanager
def single_process() -> Iterator[None]:
    """Hides the other processes from libraries that split work over them, for work that one process does alone.

    compressed-tensors, for example, decompresses the linears of a checkpoint in all processes that are connected, and
    waits for those that do something else.
    """
    if world_size() == 1:
        yield
        return
    from torch.distributed import GroupMember

    group, GroupMember.WORLD = GroupMember.WORLD, None
    try:
        yield
    finally:
        GroupMember.WORLD = group


def rank_slice(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of the items: every `world_size()`-th one."""
    return items[rank() :: world_size()]


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of the tensor over all processes, in place."""
    if world_size() == 1:
        return tensor
    from torch import distributed

    with _reached():
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value: Item, process: int = 0) -> Item:
    """The value of the first process, or of another one, in every process."""
    if world_size() == 1:
        return value
    from torch import distributed

    values = [value]
    with _reached():
        distributed.broadcast_object_list(values, process)
    return values[0]


def all_gather(value: Item) -> list[Item]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values: list[Item] = [value] * world_size()
    with _reached():
        distributed.all_gather_object(values, value)
    return values


def row_range(length: int) -> slice:
    """This process's share of `length` rows: one slice. The slices of all processes follow each other."""
    return _rows_of(rank(), length)


def reduce_rows(tensor: Tensor) -> Tensor:
    """This process's rows of the sum of a tensor over all processes; the tensor itself is overwritten."""
    if world_size() == 1:
        return tensor
    from torch import distributed

    length = len(tensor)
    _collected(distributed.reduce(tensor[_rows_of(n, length)], n, async_op=True) for n in range(world_size()))
    return tensor[row_range(length)].clone()


def all_gather_rows(part: Tensor, length: int) -> Tensor:
    """The whole tensor of `length` rows, from the share of each process (`row_range`)."""
    if world_size() == 1:
        return part
    from torch import distributed

    whole = part.new_empty(length, *part.shape[1:])
    whole[row_range(length)] = part
    _collected(distributed.broadcast(whole[_rows_of(n, length)], n, async_op=True) for n in range(world_size()))
    return whole


def split_jobs(jobs: Sequence[Callable[[], tuple[Tensor, Any]]]) -> list[tuple[Tensor, Any]]:
    """Splits the jobs over the processes and gathers the results: a tensor and a small object for each job."""
    if world_size() == 1:
        return [job() for job in jobs]
    results = {index: jobs[index]() for index in rank_slice(range(len(jobs)))}
    return [_result(results.get(index), index % world_size()) for index in range(len(jobs))]


def _result(own: tuple[Tensor, Any] | None, process: int) -> tuple[Tensor, Any]:
    """The result of one process, in every process."""
    import torch
    from torch import distributed

    described = None if own is None else (own[0].shape, own[0].dtype, own[0].device.type, own[1])
    shape, dtype, device, rest = broadcast(described, process)  # type: ignore[misc]
    tensor = torch.empty(shape, dtype=dtype, device=device) if own is None else own[0].contiguous()
    _collected([distributed.broadcast(tensor, process, async_op=True)])
    return tensor, rest


def _rows_of(process: int, length: int) -> slice:
    return slice(length * process // world_size(), length * (process + 1) // world_size())


def _collected(started: Iterable[Work | None]) -> None:
    with _reached():
        for work in list(started):
            if work is not None:
                work.wait()


@contextmanager
def _reached() -> Iterator[None]:
    """Turns a lost connection to another process into a RunError."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise when a connection closes
        if lacks_memory(error):
            raise
        reason = first_line(error)
        raise RunError(
            f"another process of this run has ended or does not answer ({reason}); start the same command again"
        ) from error
