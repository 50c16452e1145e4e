"""How far a command is: bars on a terminal, a line every ten seconds elsewhere, or JSON lines for schedulers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import NamedTuple, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from epmq_cli.runtime import console
from epmq_cli.runtime.memory import status
from epmq_cli.runtime.units import duration, size
from epmq_cli.runtime.verbosity import kind

Item = TypeVar("Item")

PERIOD = {"auto": 10.0, "json": 1.0}
"""Seconds between two lines about the same stage."""
OUTLIER = 3.0
"""A kind of steps is at most this much slower than the usual one, as long as only its first step is known."""
SHORTEST = 0.1  # seconds of a stage that is worth a line on a terminal


class Part(NamedTuple):
    """A step of a stage. Steps of one kind take time in proportion to their work; of kinds that are not measured yet,
    the work is compared with that of others. A step without work says nothing about them."""

    kind: str
    work: float


@dataclass
class Meter:
    """A stage of `total` steps that has started. `parts`: the steps; without them all are alike."""

    stage: str
    total: int
    parts: Sequence[Part] = ()
    done: int = 0
    start: float = field(default_factory=lambda: time.monotonic())
    told: float = field(default_factory=lambda: time.monotonic())
    last: float = field(default_factory=lambda: time.monotonic())
    """When the last steps were finished."""
    speeds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """The work and the seconds of finished steps, by kind."""

    def advance(self, count: int) -> None:
        """Counts finished steps; with `parts`, one."""
        now, part = time.monotonic(), self.parts[self.done] if self.parts else Part("", count)
        if part.work:
            self.speeds.setdefault(part.kind, []).append((part.work, now - self.last))
        self.last = now
        self.done += count

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float | None:
        """Seconds until the end; None before steps of two kinds are done, if there are more than one."""
        kinds = {part.kind for part in self.parts if part.work}
        if len(self.speeds) < min(2, max(1, len(kinds))):
            return None
        rates = {name: _rate(samples, bool(self.parts)) for name, samples in self.speeds.items()}
        usual = median_low(rates.values())
        for name, samples in self.speeds.items():
            if len(samples) == 1:
                rates[name] = min(rates[name], OUTLIER * usual)
        rest = self.parts[self.done :] if self.parts else [Part("", self.total - self.done)]
        left = sum(part.work * rates.get(part.kind, usual) for part in rest)
        return max(0.0, left - (time.monotonic() - self.last))

    def line(self) -> str:
        """The stage with percent, steps, speed, time left and memory."""
        share = 100 * self.done // max(1, self.total)
        parts = [f"{self.stage}: {share}% ({self.done} of {self.total}"]
        if self.left is not None:
            parts[0] += f", {speed(self.done / max(self.seconds, 1e-9))})"
            parts.append(f"{duration(self.left)} left")
        else:
            parts[0] += ")"
        return ", ".join([*parts, *_memory()])

    def record(self, event: str) -> str:
        """The stage as a line of JSON."""
        left = None if self.left is None else round(self.left, 1)
        values = {"event": event, "stage": self.stage, "done": self.done, "total": self.total}
        return json.dumps({**values, "seconds": round(self.seconds, 1), "left": left, "memory": status("VmRSS")})


def _rate(samples: Sequence[tuple[float, float]], alike: bool) -> float:
    """Seconds for a unit of work. The first step of a kind does not count if there are others, since it also compiles
    kernels. `alike`: whether the steps differ only by disturbances, which the median leaves out."""
    later = samples[1:] or samples
    if alike:
        return median(seconds / work for work, seconds in later)
    return sum(seconds for _, seconds in later) / sum(work for work, _ in later)


@contextmanager
def bar(stage: str, total: int, parts: Sequence[Part] = ()) -> Iterator[Callable[[int], None]]:
    """A function that counts finished steps, out of `total`, and shows them: a bar on a terminal; elsewhere a line at
    most every ten seconds; JSON lines with progress=json. run.log gets one line for the stage in any case."""
    console.log.info("%s: %d steps", stage, total)
    meter = Meter(stage, total, parts)
    if kind() == "json":
        with _lines(meter, lambda: _print(meter.record("progress"))) as advance:
            _print(meter.record("begin"))
            yield advance
            _print(meter.record("end"))
    elif kind() == "quiet" or console.messages.quiet:
        yield lambda count: None
    elif not console.messages.is_terminal:
        with _lines(meter, lambda: _print(meter.line())) as advance:
            yield advance
    else:
        with Progress(*_columns(meter), console=console.messages, transient=True) as progress:
            task = progress.add_task(stage, total=total)

            def show(count: int) -> None:
                meter.advance(count)
                progress.advance(task, count)

            yield show


def track(items: Sequence[Item], stage: str) -> Iterator[Item]:
    """The items, with a progress bar that advances after each one."""
    with bar(stage, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


def finished(stage: str, seconds: float, peak: int) -> None:
    """Tells that a stage of a command is finished, with its peak of memory in bytes."""
    console.log.info("%s: %s, peak %s", stage, duration(seconds), size(peak))
    if kind() == "json":
        _print(json.dumps({"event": "stage", "stage": stage, "seconds": round(seconds, 1), "peak": peak}))
    elif kind() == "auto" and console.messages.is_terminal and seconds >= SHORTEST:
        line = Text.assemble(("  ✓ ", "green"), f"{stage:<24} {duration(seconds):>8}  ", (f"peak {size(peak)}", "dim"))
        console.messages.print(line)
    elif kind() == "auto" and not console.messages.is_terminal and seconds >= PERIOD["auto"]:
        _print(f"{stage}: finished in {duration(seconds)}, peak {size(peak)}")


def speed(rate: float) -> str:
    """Steps a second, or seconds a step."""
    return f"{rate:.3g} a second" if rate >= 1 else f"{duration(1 / rate)} each"


@contextmanager
def _lines(meter: Meter, tell: Callable[[], None]) -> Iterator[Callable[[int], None]]:
    def advance(count: int) -> None:
        meter.advance(count)
        if time.monotonic() - meter.told >= PERIOD[kind()] and meter.done < meter.total:
            meter.told = time.monotonic()
            tell()

    yield advance


def _print(line: str) -> None:
    console.messages.print(line, markup=False, highlight=False, soft_wrap=True)


def _memory() -> list[str]:
    taken = status("VmRSS")
    return [] if taken is None else [f"memory {size(taken)}"]


class _Memory(ProgressColumn):
    """The memory that the process takes now."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(", ".join(_memory()), style="dim")


class _Speed(ProgressColumn):
    """Steps a second, or seconds a step."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        rate = task.speed or task.finished_speed
        return Text(speed(rate) if rate else "", style="dim")


class _Left(ProgressColumn):
    """The time left."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        """The text of the column."""
        left = self._meter.left
        return Text("" if left is None else f"{duration(left)} left", style="cyan")


def _columns(meter: Meter) -> tuple[ProgressColumn, ...]:
    own = (TimeElapsedColumn(), _Left(meter), _Speed(), _Memory())
    return (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), *own)
