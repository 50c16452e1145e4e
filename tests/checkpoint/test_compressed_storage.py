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
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from epmq_cli.checkpoint.calibrated_scales import expected_inputs
from epmq_cli.checkpoint.compressed_schemes import described, scheme_of, storage_name
from epmq_cli.checkpoint.compressed_storage import storage_of
from epmq_cli.checkpoint.compressed_tensors import CompressedTensorsExporter
from epmq_cli.checkpoint.dense import DenseExporter
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat, PlainScales, QuantizedWeight
from epmq_cli.quantize.formats.int import IntFormat
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
    W = torch.randn(12, 256, generator=generator) * torch.logspace(-6, 0, 12)[:, None] * size
    W[3], W[7, 5] = 0, 9 * size
    own = format.for_range(float(W.abs().max())).for_inputs(7.5)
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


@pytest.mark.parametrize("name", [name for name in FIXED if name != "fp8_static"])
def test_schemes_are_those_that_compressed_tensors_knows_by_this_name(name: str) -> None:
    own = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(FIXED[name])})
    assert is_preset_scheme(name)
    assert own.model_dump() == preset_name_to_scheme(name, ["Linear"]).model_dump()


def test_static_fp8_is_the_preset_of_compressed_tensors_but_for_scales_by_row() -> None:
    own = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(FIXED["fp8_static"])}).model_dump()
    preset = preset_name_to_scheme("fp8", ["Linear"]).model_dump()
    assert own["weights"] == preset["weights"] | {"strategy": "channel"}
    assert own["input_activations"] | {"observer": "static_minmax"} == preset["input_activations"]


def test_w4a8_in_groups_of_128_is_the_preset_of_compressed_tensors() -> None:
    own = scheme_of(IntFormat(4, 128, "none", "int8"))
    found = QuantizationScheme.model_validate({"targets": ["Linear"], **own})
    assert found.model_dump() == preset_name_to_scheme("w4a8", ["Linear"]).model_dump()


@pytest.mark.parametrize("rows", [128, 130, 300])
def test_blocks_of_rows_are_those_of_compressed_tensors(rows: int, tmp_path: Path) -> None:
    """Also where the last block is smaller; its scales are those of its own rows."""
    W = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 1, rows)[:, None]
    weight = rtn(W, FIXED["fp8_block"], "minmax", torch.float32)
    files = stored(weight, tmp_path)
    assert files.infos["it.weight_scale"].shape == (-(-rows // 128), 2)
    torch.testing.assert_close(
        files.tensor("it.weight_scale")[-1, 0], W[-(rows % 128 or 128) :, :128].abs().max() / 448
    )
    assert torch.equal(theirs(files, FIXED["fp8_block"]), weight.dequantize())


def test_the_scale_of_inputs_is_the_one_that_compressed_tensors_computes(tmp_path: Path) -> None:
    """Its formulas for a static scale, and for the global scale of NVFP4."""
    low, high = torch.tensor([-7.5]), torch.tensor([3.0])
    own = stored(weight_of(FIXED["fp8_static"], torch.float16), tmp_path).tensor("it.input_scale")
    args = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme_of(FIXED["fp8_static"])})
    wanted, _ = calculate_qparams(low, high, args.input_activations)
    assert torch.equal(own, wanted)
    found = stored(weight_of(FIXED["nvfp4"], torch.float16), tmp_path).tensor("it.input_global_scale")
    torch.testing.assert_close(found, generate_gparam(low, high), rtol=1e-6, atol=0)


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
        ("fp8_static", "input_scale", 0.0, "holds scales that are not above 0"),
        ("nvfp4", "input_global_scale", float("nan"), "holds NaN or infinity"),
    ],
)
def test_damaged_scales_are_found(name: str, part: str, value: float, message: str, tmp_path: Path) -> None:
    format, weight = EVERY[name], weight_of(EVERY[name], torch.float16)
    files = stored(weight, tmp_path)
    tensor, found = files.tensor(f"it.{part}").clone(), storage_of(format)
    tensor.view(-1)[0] = value
    expected = found.scales.expected("it", weight.grid.scale.shape, format, signed=False)
    expected |= expected_inputs("it", format)
    assert expected[f"it.{part}"].check(tensor) == message
