"""Oracle: what pack.py packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.checkpoint.compressed_tensors import quantized_linear
from epmq_cli.checkpoint.write import packed_linear
from epmq_cli.errors import CheckpointError
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import BITS
from epmq_cli.quantize.rtn import rtn
from tests.formats import ints

CPU = torch.device("cpu")
SHAPE = torch.Size((24, 48))


def packed(folder: Path, format: NumberFormat, shape: torch.Size = SHAPE) -> tuple[QuantizedWeight, SafetensorsFiles]:
    """A random weight on a grid, and the file that it was packed into."""
    weight = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(0)), format, "mse", torch.float16)
    save_file(
        {entry.name: entry.make().contiguous() for entry in packed_linear("it", weight)}, folder / "a.safetensors"
    )
    return weight, SafetensorsFiles(folder / "a.safetensors", "checkpoint")


INTEGERS = [ints(bits, size, symmetric) for bits in BITS for size in (-1, 16) for symmetric in (True, False)]


@pytest.mark.parametrize("format", [*INTEGERS, Fp8Format(-1), Fp8Format(16)], ids=repr)
def test_reading_is_the_inverse_of_writing(format: NumberFormat, tmp_path: Path) -> None:
    weight, files = packed(tmp_path, format)
    found = quantized_linear(files, "it", weight.format, SHAPE, CPU)
    assert found.codes.dtype == format.storage
    assert torch.equal(found.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(found.grid.scale, weight.grid.scale)
    assert (found.grid.zero is None) == (weight.grid.zero is None)
    assert torch.equal(found.grid.zeros, weight.grid.zeros)
    assert found.dtype == weight.dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_zero_points_of_few_rows_fill_one_word(bits: int, rows: int, tmp_path: Path) -> None:
    shape = torch.Size((rows, 32))
    weight, files = packed(tmp_path, ints(bits, 16, False), shape)
    assert torch.equal(quantized_linear(files, "it", weight.format, shape, CPU).grid.zeros, weight.grid.zeros)


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "symmetric", "shape"),
    [
        ("it", 4, 16, True, (24, 64)),
        ("it", 4, 16, True, (16, 48)),
        ("it", 8, 16, True, (24, 48)),
        ("it", 4, -1, True, (24, 48)),
        ("it", 4, 16, False, (24, 48)),
        ("other", 4, 16, True, (24, 48)),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(
    name: str, bits: int, group_size: int, symmetric: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    _, files = packed(tmp_path, ints(4, 16, True))
    with pytest.raises(CheckpointError, match=f"the tensors of {name} are not those that config.json describes; see"):
        quantized_linear(files, name, ints(bits, group_size, symmetric), torch.Size(shape), CPU)
