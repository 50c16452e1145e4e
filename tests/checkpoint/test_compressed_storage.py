"""Oracle: the compressors of compressed-tensors, for every format that quant.format names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from epmq_cli.checkpoint.compressed_schemes import scheme_of, storage_name
from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter, layout
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.rtn import rtn
from epmq_cli.store.safetensors_writer import write_file
from tests.helpers.formats import every_format

EVERY = every_format()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(format: NumberFormat, dtype: torch.dtype, size: float = 1.0) -> QuantizedWeight:
    """Rows of different sizes, one of zeros, with one large weight."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 192, generator=generator) * torch.logspace(-6, 0, 12)[:, None] * size
    W[3], W[7, 5] = 0, 9 * size
    own = format.for_range(float(W.abs().max()))
    return rtn(W, own, "mse", dtype)


def stored(weight: QuantizedWeight, folder: Path) -> SafetensorsFiles:
    """A checkpoint folder with this weight alone."""
    write_file(folder / "model.safetensors", CompressedTensorsExporter("auto", "5GB", False).entries("it", weight))
    return SafetensorsFiles(folder, "checkpoint")


def theirs(files: SafetensorsFiles, format: NumberFormat) -> Tensor:
    """The weight as compressed-tensors decompresses it."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(format)})
    tensors = {name.removeprefix("it."): files.tensor(name) for name in files.infos}
    found: Tensor = BaseCompressor.get_value_from_registry(storage_name(format)).decompress(tensors, scheme)["weight"]
    return found


CASES = list(itertools.product(EVERY, DTYPES, (1.0, 1e-4)))


@pytest.mark.parametrize(("name", "dtype", "size"), CASES, ids=str)
def test_compressed_tensors_and_our_reader_have_the_weights_that_were_scored(
    name: str, dtype: torch.dtype, size: float, tmp_path: Path
) -> None:
    format = EVERY[name]
    weight = weight_of(format, dtype, size)
    files = stored(weight, tmp_path)
    assert torch.equal(theirs(files, format).to(dtype), weight.dequantize().to(dtype))
    config = {"ignore": [], "config_groups": {"group_0": {"targets": ["Linear"], **scheme_of(format)}}}
    own = layout(tmp_path, json.loads(json.dumps(config)))
    read = own.read(files, "it", weight.shape, torch.device("cpu"))
    assert own.format_of("it") == format
    assert read.format == weight.format
    assert torch.equal(read.codes.float(), weight.codes.float())
    assert torch.equal(read.grid.scale, weight.grid.scale)
    assert torch.equal(read.dequantize().to(dtype), weight.dequantize().to(dtype))
    expected = own.expected("it", weight.shape, signed=False)
    for part, info in files.infos.items():
        assert (tuple(info.shape), info.dtype) == (expected[part].shape, expected[part].dtype or info.dtype)
        assert expected[part].check(files.tensor(part)) is None
    assert expected.keys() == files.infos.keys()
