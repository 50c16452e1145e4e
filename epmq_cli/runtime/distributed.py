"""The processes that share one run, as torchrun starts them: each has its part of the calibration samples, sums go over
all of them, and the first one writes and scores.

Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from epmq_cli.errors import ConfigError, RunError, first_line, lacks_memory, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Work

Item = TypeVar("Item")

VARIABLES = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to its processes, of them and of where they meet."""
PATIENCE = timedelta(days=7)  # the others wait while the first one scores


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _told("RANK") if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are."""
    return _told("WORLD_SIZE")


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return _told("LOCAL_RANK") if world_size() > 1 else 0


def _told(name: str) -> int:
    """What a variable says; what it says of one process where it is no number, which `check` refuses."""
    value = os.environ.get(name, "")
    return int(value if value.isdecimal() else VARIABLES[name])


def check_environment(command: str) -> None:
    """ConfigError unless the variables that torchrun sets are as it sets them, and the command is one for several
    processes if there are any."""
    found = {name: os.environ.get(name, usual) for name, usual in VARIABLES.items()}
    told = " ".join(f"{name}={shown(value)}" for name, value in found.items())
    size, *numbers = [int(value) if value.isdecimal() else -1 for value in found.values()]
    if size < 1 or min(numbers) < 0 or (size > 1 and max(numbers) >= size):
        raise ConfigError(f"torchrun never sets {told}; start the processes with it, or unset these variables")
    missing = [name for name in PLACE if not os.environ.get(name)]
    if size > 1 and missing:
        raise ConfigError(f"{told} is set without {missing[0]}; start the processes with torchrun")
    if size > 1 and command != "run":
        raise ConfigError(f"epmq {command} is done by one process; start it without torchrun")


def is_main() -> bool:
    """Whether this is the process that writes and scores."""
    return rank() == 0


def init(device: torch.device) -> None:
    """Meets the other processes, once; the device becomes this process's own."""
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
            raise RunError(f"the processes of this run do not meet ({reason}); start them with torchrun") from error
        atexit.register(distributed.destroy_process_group)


def rank_slice(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of some items: every `count()`-th of them."""
    return items[rank() :: world_size()]


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of this tensor over all processes, in its place."""
    if world_size() == 1:
        return tensor
    from torch import distributed

    with _reached():
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value: Item, process: int = 0) -> Item:
    """What the first process, or another one, has for this value."""
    if world_size() == 1:
        return value
    from torch import distributed

    values = [value]
    with _reached():
        distributed.broadcast_object_list(values, process)
    return values[0]


def all_gather(value: Item) -> list[Item]:
    """What each process has for this value, in their order."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values: list[Item] = [value] * world_size()
    with _reached():
        distributed.all_gather_object(values, value)
    return values


def row_range(length: int) -> slice:
    """This process's part of so many rows, in one piece; those of all processes follow each other."""
    return _rows_of(rank(), length)


def reduce_rows(tensor: Tensor) -> Tensor:
    """This process's rows of the sum of a tensor over all processes; the tensor itself is used up."""
    if world_size() == 1:
        return tensor
    from torch import distributed

    length = len(tensor)
    _collected(distributed.reduce(tensor[_rows_of(n, length)], n, async_op=True) for n in range(world_size()))
    return tensor[row_range(length)].clone()


def all_gather_rows(part: Tensor, length: int) -> Tensor:
    """The whole tensor of so many rows, of which each process has the part that `rows` says."""
    if world_size() == 1:
        return part
    from torch import distributed

    whole = part.new_empty(length, *part.shape[1:])
    whole[row_range(length)] = part
    _collected(distributed.broadcast(whole[_rows_of(n, length)], n, async_op=True) for n in range(world_size()))
    return whole


def split_jobs(jobs: Sequence[Callable[[], tuple[Tensor, Any]]]) -> list[tuple[Tensor, Any]]:
    """What some jobs give, a tensor and something small each: every process does its part of them, and all get all."""
    if world_size() == 1:
        return [job() for job in jobs]
    made = {index: jobs[index]() for index in rank_slice(range(len(jobs)))}
    return [_given(made.get(index), index % world_size()) for index in range(len(jobs))]


def _given(made: tuple[Tensor, Any] | None, process: int) -> tuple[Tensor, Any]:
    """What one of the processes has made."""
    import torch
    from torch import distributed

    described = None if made is None else (made[0].shape, made[0].dtype, made[0].device.type, made[1])
    shape, dtype, device, rest = broadcast(described, process)  # type: ignore[misc]
    tensor = torch.empty(shape, dtype=dtype, device=device) if made is None else made[0].contiguous()
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
    """RunError where another process is not to be reached inside."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise where a connection is closed
        if lacks_memory(error):
            raise
        reason = first_line(error)
        raise RunError(
            f"another process of this run has ended or cannot be reached ({reason}); start the same command again"
        ) from error
