"""Oracle: a naive unpacker, bit by bit in plain integers, written from the description of the AutoGPTQ format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.checkpoint.gptq import BITS, layout, mirrored, unmirrored
from epmq_cli.errors import ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.names import FIXED
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import ints
from tests.helpers.packs import LINEAR, exporter_of, model_of

SHAPE = torch.Size((32, 64))


def tensors_of(weight: QuantizedWeight, form: str) -> dict[str, Tensor]:
    """The four tensors of a linear."""
    entries = exporter_of("gptq", format=form).entries("it", weight)
    tensors = {entry.name.removeprefix("it."): entry.make() for entry in entries}
    assert {entry.name.removeprefix("it."): (entry.shape, entry.dtype) for entry in entries} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    return tensors


def codes_of(words: list[int], bits: int, count: int) -> list[int]:
    """The codes in a run of words: one long integer, lowest word first, cut every `bits` bits."""
    whole = sum((word % (1 << 32)) << (32 * index) for index, word in enumerate(words))
    return [(whole >> (bits * index)) % (1 << bits) for index in range(count)]


def naive(tensors: dict[str, Tensor], bits: int, form: str) -> Tensor:
    """The dequantized weight (out, in), element by element."""
    inputs, outputs = len(tensors["g_idx"]), tensors["scales"].shape[1]
    codes = [codes_of(tensors["qweight"][:, row].tolist(), bits, inputs) for row in range(outputs)]
    zeros = [codes_of(words, bits, outputs) for words in tensors["qzeros"].tolist()]
    more = 1 if form == "gptq" else 0  # in a wider type, as in readers: 15 + 1 is 16
    return torch.tensor(
        [
            [
                (codes[row][column] - zeros[group][row] - more) * float(tensors["scales"][group, row])
                for column, group in enumerate(tensors["g_idx"].tolist())
            ]
            for row in range(outputs)
        ]
    )


def positive_weight(format: NumberFormat) -> QuantizedWeight:
    """A random weight on a grid. The upper rows are positive, so asymmetric zero points are the lowest code."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    weight[:8] = weight[:8].abs()
    return rtn(weight, format, "minmax", torch.float16)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_the_naive_unpacker_returns_the_dequantized_weight(
    form: str, bits: int, symmetric: bool, group_size: int
) -> None:
    weight = positive_weight(ints(bits, group_size, symmetric))
    assert (weight.grid.zeros == weight.format.lowest).any() != symmetric
    found = naive(tensors_of(weight, form), bits, form)
    assert torch.equal(found.half().float(), weight.dequantize())


def test_symmetric_zero_points_are_the_constant_that_kernels_expect() -> None:
    weight = positive_weight(ints(4, 16))
    assert set(tensors_of(weight, "gptq")["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(tensors_of(weight, "gptq_v2")["qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}


def test_mirroring_keeps_the_weight_and_avoids_zero_points_at_the_lowest_code() -> None:
    weight = positive_weight(ints(3, 16, False))
    other = mirrored(weight)
    assert not torch.equal(other.codes, weight.codes)
    assert not (other.grid.zeros == weight.format.lowest).any()
    assert torch.equal(other.dequantize(), weight.dequantize())
    back = unmirrored(other)
    pairs = (back.codes, weight.codes), (back.grid.scale, weight.grid.scale), (back.grid.zeros, weight.grid.zeros)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("damping", "written"), [(0.01, {"damp_percent": 0.01}), (None, {}), (1.0, {})])
def test_quantize_config_matches_config_json(damping: float | None, written: dict[str, float]) -> None:
    exporter = exporter_of("gptq", damping=damping)
    config = exporter.config(model_of(SHAPE), {LINEAR: positive_weight(ints(4, 16))}, False)
    assert {name: json.loads(text) for name, text in exporter.files(config).items()} == {"quantize_config.json": config}
    assert {key: value for key, value in config.items() if key == "damp_percent"} == written
    assert {
        "bits": 4,
        "group_size": 16,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
    }.items() <= config.items()
    assert config["block_name_to_quantize"] == "layers"


@pytest.mark.parametrize(
    ("family", "formats", "message"),
    [
        ("causal_lm", [], "pack=gptq stores quantized weights, but no weight is quantized; use pack=dense"),
        (
            "clip",
            [ints(4, 16)],
            "pack=gptq is loaded for text models only, this family reads pictures; use pack=compres",
        ),
        ("bert", [ints(3, 16), ints(4, 16)], "one format for all linears, got int3 and int4; use pack=compressed_tens"),
        ("bert", [Fp8Format(-1)], "pack=gptq stores integers, got fp8; use pack=compressed_tensors"),
        (
            "bert",
            [IntFormat(4, 16, "real")],
            "stores whole zero points, and those of this quantizer are real numbers; ",
        ),
        ("bert", [FIXED["w8a8"]], "pack=gptq stores integers, got w8a8; use pack=compressed_tensors"),
        ("bert", [ints(5, 16)], "bits with pack=gptq must be one of 2, 3, 4, 8, got 5"),
        ("bert", [ints(4, 24)], "group_size with pack=gptq must be one of -1, 16, 32, 64, 128, 256, 512, 1024, got 24"),
    ],
)
def test_options_that_loaders_do_not_support_are_refused_first(
    family: str, formats: list[NumberFormat], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        exporter_of("gptq").check(FAMILIES[family], formats)


@pytest.mark.parametrize(
    ("linears", "bits", "message"),
    [
        ({"encoder.block.0.q": (32, 32), "decoder.block.0.q": (32, 32)}, 4, "got decoder.block and encoder.block; use"),
        ({"layers.0.other": (32, 32)}, 4, "stores all linears of a block, and layers.0.linear is not quantized; use"),
        (
            {LINEAR: (24, 32)},
            3,
            "3 bits of weights whose inputs and outputs are multiples of 32, got layers.0.linear w",
        ),
        ({LINEAR: (32, 20)}, 4, "4 bits of .* multiples of 8, got layers.0.linear with 20 inputs and 32 outputs; use"),
    ],
)
def test_linears_that_do_not_fit_the_format_are_refused_before_calibration(
    linears: dict[str, tuple[int, int]], bits: int, message: str
) -> None:
    shapes = {name: torch.Size(shape) for name, shape in linears.items()}
    with pytest.raises(ConfigError, match=message):
        exporter_of("gptq").check_linears(shapes, model_of(SHAPE), [ints(bits, 16)])


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_only_the_types_of_the_kernels_are_allowed(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"pack.dtype must be one of float16, bfloat16, got '{dtype}'"):
        exporter_of("gptq", dtype=dtype)


@pytest.mark.parametrize(
    ("symmetric", "part", "problem"),
    [
        (True, "qzeros", "holds zero points, config.json implies none"),
        (False, "qzeros", None),
        (True, "g_idx", "does not put 16 neighbouring inputs into each group"),
        (True, "scales", "holds scales that are not above 0"),
        (False, "scales", None),
    ],
)
def test_unknown_values_of_the_format_are_named(symmetric: bool, part: str, problem: str | None) -> None:
    weight = positive_weight(ints(4, 16, symmetric))
    exporter = exporter_of("gptq")
    reader = layout(Path(), exporter.config(model_of(SHAPE), {LINEAR: weight}, False))
    expected = reader.expected("it", SHAPE, signed=False)[f"it.{part}"]
    tensor = tensors_of(weight, "gptq")[part]
    assert expected.check(tensor) is None
    changed = tensor.clone()
    changed.view(-1)[1] = -1
    assert expected.check(changed) == problem
