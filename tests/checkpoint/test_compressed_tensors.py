"""Oracle: what pack.py packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.checkpoint.compressed_tensors import unpacked_linear
from epmq_cli.checkpoint.write import packed_linear
from epmq_cli.errors import CheckpointError
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.int import BITS, GridSpec, QuantizedWeight
from epmq_cli.quantize.rtn import rtn

CPU = torch.device("cpu")
SHAPE = torch.Size((24, 48))


def packed(folder: Path, spec: GridSpec, shape: torch.Size = SHAPE) -> tuple[QuantizedWeight, SafetensorsFiles]:
    """A random weight on a grid, and the file that it was packed into."""
    weight = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec, torch.float16)
    save_file(
        {entry.name: entry.make().contiguous() for entry in packed_linear("it", weight)}, folder / "a.safetensors"
    )
    return weight, SafetensorsFiles(folder / "a.safetensors", "checkpoint")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_unpacking_is_the_inverse_of_packing(bits: int, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    weight, files = packed(tmp_path, GridSpec(bits, group_size, symmetric, "mse"))
    found = unpacked_linear(files, "it", weight.spec, SHAPE, CPU)
    assert torch.equal(found.values, weight.values)
    assert torch.equal(found.scale, weight.scale)
    assert torch.equal(found.zero, weight.zero)
    assert found.dtype == weight.dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_zero_points_of_few_rows_fill_one_word(bits: int, rows: int, tmp_path: Path) -> None:
    shape = torch.Size((rows, 32))
    weight, files = packed(tmp_path, GridSpec(bits, 16, False, "minmax"), shape)
    assert torch.equal(unpacked_linear(files, "it", weight.spec, shape, CPU).zero, weight.zero)


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
    _, files = packed(tmp_path, GridSpec(4, 16, True, "minmax"))
    with pytest.raises(CheckpointError, match=f"the tensors of {name} are not those that config.json describes; see"):
        unpacked_linear(files, name, GridSpec(bits, group_size, symmetric, "minmax"), torch.Size(shape), CPU)
