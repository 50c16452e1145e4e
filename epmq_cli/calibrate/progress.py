"""Stores what a walk has finished, section by section, so that a walk that was killed resumes after the last section.

The file of an entry is a safetensors file with the student's tensors that a section replaced, its quantized weights
and, in the header, the records of its linears. Activations are not stored: batches run through the finished sections
again, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from epmq_cli.calibrate.block_refinement import BlockRecord
from epmq_cli.calibrate.progress_file import SUFFIX, opened, write_tensors
from epmq_cli.calibrate.solve_layer import LayerRecord
from epmq_cli.calibrate.student import Student
from epmq_cli.calibrate.weight_sink import WeightSink, stored
from epmq_cli.models.weights import copy_into
from epmq_cli.quantize.formats.format import QuantizedWeight
from epmq_cli.quantize.mixed_precision import Sensitivity
from epmq_cli.runtime import distributed


@dataclass(frozen=True)
class WalkResult:
    """The result of a walk: the weights of the blocks' linears by module name, and in the order of the walk the records
    of linears, of refined blocks, and of groups of linears whose formats were chosen."""

    weights: WeightSink
    records: list[LayerRecord]
    blocks: list[BlockRecord] = field(default_factory=list)
    sensitivities: list[Sensitivity] = field(default_factory=list)


class Account(Protocol):
    """What a walk measures besides its result."""

    def state(self) -> Any:
        """All measurements so far, as a JSON value."""

    def restore(self, state: Any) -> None:
        """Replaces the measurements."""


class WalkProgress:
    """The finished entries of a walk, in files of a folder. Without a folder nothing is stored.

    `account`: stored with each entry. Of several processes, the main one writes and all read.
    """

    def __init__(self, folder: Path | None = None, account: Account | None = None) -> None:
        self._folder, self._account = folder, account
        names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}")) if folder and distributed.is_main() else []
        self.entries: frozenset[str] = frozenset(distributed.broadcast(names) if folder else names)
        """The entries that an earlier process has finished."""
        self._recorded = 0, 0  # how many of the walk's records, of linears and blocks, are in finished entries

    def restore_all(self, entries: Collection[str], student: Student, result: WalkResult) -> bool:
        """Restores all entries of a finished walk. Returns False, and does nothing, if the walk is not finished."""
        finished = self.entries.issuperset(entries)
        for entry in entries if finished else ():
            self.restore(entry, student, result)
        return finished

    def restore(self, entry: str, student: Student, result: WalkResult) -> bool:
        """Copies an entry into the student, and adds it to the result. Returns False if it is not finished. RunError if
        its file is damaged."""
        if self._folder is None or entry not in self.entries:
            return False
        path = self._path(entry)
        with opened(path) as (file, header):
            names, weights = header["weights"], result.weights
            copy_into(student.model, ((name, file.get_tensor(f"tensor.{name}").float()) for name in header["tensors"]))
            weights.move(names, path)
            copy_into(student.model, ((f"{name}.weight", weights[name].dequantize()) for name in names))
            result.records.extend(LayerRecord(**record) for record in header["records"])
            result.blocks.extend(BlockRecord(**record) for record in header["blocks"])
            if self._account is not None:
                self._account.restore(header["account"])
        self._recorded = len(result.records), len(result.blocks)
        return True

    def write(self, entry: str, student: Student, result: WalkResult) -> None:
        """Writes an entry: all that the student and the result have received since the entry before. Its weights leave
        the memory. RunError if the disk refuses the file."""
        changed = student.take_changed()
        if self._folder is None:
            return
        path, weights = self._path(entry), result.weights.in_memory()
        if distributed.is_main():
            quantized, headers = stored(weights)
            packed = {f"{name}.weight" for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
            dense = [name for name in changed if name not in packed]
            header = {
                "tensors": dense,
                "weights": headers,
                "records": [asdict(record) for record in result.records[self._recorded[0] :]],
                "blocks": [asdict(record) for record in result.blocks[self._recorded[1] :]],
                "account": None if self._account is None else self._account.state(),
            }
            own = student.model.state_dict()
            write_tensors(path, {f"tensor.{name}": own[name].to(student.dtype) for name in dense} | quantized, header)
        result.weights.move(weights, path)
        self._recorded = len(result.records), len(result.blocks)

    def _path(self, entry: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{entry}{SUFFIX}"
