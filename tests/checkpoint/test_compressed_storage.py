"""Oracle: the compressors of compressed-tensors, for every format that quant.format names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import is_preset_scheme, preset_name_to_scheme
from torch import Tensor

from epmq_cli.checkpoint.compressed_schemes import described, scheme_of, storage_name
from epmq_cli.checkpoint.compressed_storage import storage_of
from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.dense import DenseExporter
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat, PlainScales, QuantizedWeight
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.rtn import rtn
from epmq_cli.store.safetensors_writer import write_file
from tests.helpers.formats import every_format
from tests.helpers.tiers import only

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
    write_file(
        folder / "model.safetensors", CompressedTensorsExporter("auto", "5GB", None, False).entries("it", weight)
    )
    return SafetensorsFiles(folder, "checkpoint")


def theirs(files: SafetensorsFiles, format: NumberFormat) -> Tensor:
    """The weight as compressed-tensors decompresses it."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(format)})
    tensors = {name.removeprefix("it."): files.tensor(name) for name in files.infos}
    found: Tensor = BaseCompressor.get_value_from_registry(storage_name(format)).decompress(tensors, scheme)["weight"]
    return found


CASES = list(itertools.product(EVERY, DTYPES, (1.0, 1e-4)))


@pytest.mark.parametrize(
    ("name", "dtype", "size"), only([(name, torch.float16, 1.0) for name in EVERY], CASES), ids=str
)
def test_compressed_tensors_has_the_weights_that_were_scored(
    name: str, dtype: torch.dtype, size: float, tmp_path: Path
) -> None:
    """Also where weights are so small that float16 has few numbers for them."""
    weight = weight_of(EVERY[name], dtype, size)
    assert torch.equal(theirs(stored(weight, tmp_path), EVERY[name]).to(dtype), weight.dequantize().to(dtype))


@pytest.mark.parametrize("name", EVERY)
def test_a_scheme_describes_its_format_and_no_other(name: str) -> None:
    written = json.loads(json.dumps(scheme_of(EVERY[name])))
    assert [other for other, format in EVERY.items() if scheme_of(format) == written] == [name]
    assert described(written) == EVERY[name]


@pytest.mark.parametrize("name", FIXED)
def test_schemes_are_those_that_compressed_tensors_knows_by_this_name(name: str) -> None:
    own = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(FIXED[name])})
    assert is_preset_scheme(name)
    assert own.model_dump() == preset_name_to_scheme(name, ["Linear"]).model_dump()


@pytest.mark.parametrize("name", FIXED)
def test_only_this_format_of_checkpoints_stores_the_format_of_activations(name: str) -> None:
    CompressedTensorsExporter("auto", "5GB", None, False).check(FAMILIES["bert"], [FIXED[name]])
    if FIXED[name].activations == "none":
        DenseExporter("auto", "5GB", None, False).check(FAMILIES["bert"], [FIXED[name]])
        return
    with pytest.raises(ConfigError, match=f"pack=dense stores no format of activations, got quant.format={name}; use "):
        DenseExporter("auto", "5GB", None, False).check(FAMILIES["bert"], [FIXED[name]])


def test_a_format_that_compressed_tensors_does_not_know_is_refused() -> None:
    class OtherFormat(PlainScales):
        name = "other"

    other: Any = OtherFormat()
    with pytest.raises(ConfigError, match="pack=compressed_tensors cannot store the format other; use pack=dense"):
        storage_name(other)


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("mxfp4a16", "weight_scale", 255, "holds exponents of NaN"),
        ("nvfp4a16", "weight_scale", 0.0, "holds scales that are not above 0"),
        ("nvfp4a16", "weight_global_scale", 0.0, "holds scales that are not above 0"),
        ("w8a8", "weight_scale", float("nan"), "holds NaN or infinity"),
    ],
)
def test_damaged_scales_are_found(name: str, part: str, value: float, message: str, tmp_path: Path) -> None:
    format, weight = EVERY[name], weight_of(EVERY[name], torch.float16)
    files = stored(weight, tmp_path)
    tensor, found = files.tensor(f"it.{part}").clone(), storage_of(format)
    tensor.view(-1)[0] = value
    expected = found.scales.expected("it", weight.grid.scale.shape, format, signed=False)
    assert expected[f"it.{part}"].check(tensor) == message
