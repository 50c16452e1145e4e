"""What a walk has finished, section by section, so that it can go on there after the process was killed.

Each entry is a safetensors file with the tensors of the student that a section replaced and, in its header, the records
of its linears. Activations are not kept: batches are sent through what is finished once more, which gives the same bits
as it did the first time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epmq_cli.calibrate.solve_layer import LayerRecord
from epmq_cli.calibrate.student import Student
from epmq_cli.errors import RunError
from epmq_cli.models.weights import copy_into
from epmq_cli.quantize.formats.format import DenseWeight, Grid, QuantizedWeight
from epmq_cli.quantize.formats.names import as_json, from_json
from epmq_cli.runtime import distributed
from epmq_cli.store.atomic import atomic_file
from epmq_cli.store.safetensors_writer import of, write_file

Weight = QuantizedWeight | DenseWeight
HEADER = "epmq"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class WalkResult:
    """The result of a walk: the weights of the blocks' linears by module name, and the records in the order of the
    walk."""

    weights: Mapping[str, Weight]
    records: list[LayerRecord]


class Account(Protocol):
    """What a walk notes beside its weights."""

    def state(self) -> Any:
        """All that was noted so far, as JSON has it."""

    def restore(self, state: Any) -> None:
        """Notes this instead."""


class WalkProgress:
    """The entries of one walk: in files of a folder, or in memory where there is none.

    `account`: what is kept with each entry. The first of several processes writes, all of them read.
    """

    def __init__(self, folder: Path | None = None, account: Account | None = None) -> None:
        self._folder, self._account = folder, account
        names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}")) if folder and distributed.is_main() else []
        self.known: frozenset[str] = frozenset(distributed.broadcast(names) if folder else names)
        """The entries that an earlier process has made."""
        self._weights: dict[str, Weight] = {}  # of the entry that is being made, or of all where there is no folder
        self._files: dict[str, Path] = {}  # of those that are written
        self._records: list[LayerRecord] = []
        self._begin = 0  # of the entry's records

    @property
    def result(self) -> WalkResult:
        """What the walk found; weights that are in files are read when they are asked for."""
        return WalkResult(LazyWeights(self._files) if self._folder else self._weights, self._records)

    def note(self, names: Sequence[str], weights: Sequence[Weight], records: Sequence[LayerRecord]) -> None:
        """Adds linears to the entry that is being made; weights only of those that the checkpoint may have packed."""
        self._weights.update(zip(names, weights, strict=True))
        self._records.extend(records)

    def restore_all(self, entries: Collection[str], student: Student) -> bool:
        """`restore` for all entries of a walk that is finished; False, and nothing done, where it is not."""
        finished = self.known.issuperset(entries)
        for entry in entries if finished else ():
            self.restore(entry, student)
        return finished

    def restore(self, entry: str, student: Student) -> bool:
        """Gives the student what an entry of an earlier process has for it; False where there is none."""
        if self._folder is None or entry not in self.known:
            return False
        path = self._path(entry)
        with _opened(path) as file:
            header = _header(file)
            copy_into(student.model, ((name, file.get_tensor(f"tensor.{name}").float()) for name in header["tensors"]))
            stored = LazyWeights(dict.fromkeys(header["weights"], path))
            copy_into(student.model, ((f"{name}.weight", weight.dequantize()) for name, weight in stored.items()))
            self._records.extend(LayerRecord(**record) for record in header["records"])
            if self._account is not None:
                self._account.restore(header["account"])
        self._end(header["weights"], path)
        return True

    def write(self, entry: str, student: Student) -> None:
        """Ends the entry that is being made: the tensors that the student was given since the one before, and what was
        noted. RunError where the disk does not take it."""
        changed = student.take_changed()
        if self._folder is None:
            return
        path = self._path(entry)
        if distributed.is_main():
            packed = {f"{name}.weight" for name, weight in self._weights.items() if isinstance(weight, QuantizedWeight)}
            dense = [name for name in changed if name not in packed]
            header = {
                "tensors": dense,
                "weights": {name: _described(weight) for name, weight in self._weights.items()},
                "records": [asdict(record) for record in self._records[self._begin :]],
                "account": None if self._account is None else self._account.state(),
            }
            own = student.model.state_dict()
            tensors = {f"tensor.{name}": own[name].to(student.dtype) for name in dense}
            for name, weight in self._weights.items():
                if isinstance(weight, QuantizedWeight):
                    tensors |= {f"{part}.{name}": tensor for part, tensor in _parts(weight).items()}
            write_tensors(path, tensors, header)
        self._end(list(self._weights), path)

    def _path(self, entry: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{entry}{SUFFIX}"

    def _end(self, names: Iterable[str], path: Path) -> None:
        self._files.update(dict.fromkeys(names, path))
        self._weights, self._begin = {}, len(self._records)


class LazyWeights(Mapping[str, Weight]):
    """Weights by module name, each read from its file when it is asked for: mapped, so that the system can take back
    the memory."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Weight:
        with _opened(self._files[name]) as file:
            grid = _header(file)["weights"][name]
            if grid is None:
                return DenseWeight(file.get_tensor(f"tensor.{name}.weight").float())
            format, dtype = from_json(grid["format"]), getattr(torch, grid["dtype"])
            zero = None if format.zero_points == "none" else file.get_tensor(f"zero.{name}")
            own = Grid(file.get_tensor(f"scale.{name}"), zero)
            return QuantizedWeight(file.get_tensor(f"codes.{name}"), own, format, dtype)


def _parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a weight."""
    found = {"codes": weight.codes, "scale": weight.grid.scale}
    return found if weight.grid.zero is None else {**found, "zero": weight.grid.zero}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """Tensors by name and a header as JSON has it, whole or not at all; RunError where the disk does not take them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            write_file(partial, (of(name, tensor) for name, tensor in tensors.items()), {HEADER: json.dumps(header)})
    except OSError as error:
        raise not_taken(path, error) from error


def not_taken(path: Path, error: OSError) -> RunError:
    """What is to be said where the disk does not take what a run has found so far."""
    return RunError(
        f"{path} cannot be written ({error.strerror or error}); free some space there and start the same command again "
        "to continue after the last finished block"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file of an entry; RunError where it is not what was written, as the block finds."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); start from the beginning with resume=never") from error


def _header(file: Any) -> Any:
    header = (file.metadata() or {}).get(HEADER)
    if header is None:
        raise ValueError("epmq did not write it")
    return json.loads(header)


def _described(weight: Weight) -> dict[str, Any] | None:
    """The format of a weight as JSON; None if it stays dense."""
    if not isinstance(weight, QuantizedWeight):
        return None
    return {"format": as_json(weight.format), "dtype": str(weight.dtype).removeprefix("torch.")}
