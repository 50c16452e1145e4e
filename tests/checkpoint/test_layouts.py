"""Oracle: the layout of the written config.json reads the tensors of an exporter back, code for code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.checkpoint.exporter import Exporter, Layout
from epmq_cli.checkpoint.gptq import BITS
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.families import FAMILIES
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import every_format, ints
from tests.helpers.packs import LINEAR, PACKS, exporter_of, model_of

CPU = torch.device("cpu")
SHAPE = torch.Size((160, 128))
OPTIONS = [(pack, {}) for pack in PACKS] + [("gptq", {"format": "gptq_v2"})]
EXPORTERS = {"-".join([pack, *changes.values()]): exporter_of(pack, **changes) for pack, changes in OPTIONS}


def stored(folder: Path, exporter: Exporter, weight: QuantizedWeight) -> tuple[Layout, SafetensorsFiles]:
    """Writes the weight of one linear to a folder; returns the layout and the files to read it back."""
    entries = exporter.entries(LINEAR, weight)
    save_file({entry.name: entry.make().contiguous() for entry in entries}, folder / "model.safetensors")
    config = exporter.config(model_of(weight.shape), {LINEAR: weight}, dequantize=False)
    text = json.dumps({"quantization_config": config} if config else {})
    (folder / "config.json").write_text(text)
    return layout_of(folder), SafetensorsFiles(folder, "checkpoint")


def random_weight(format: NumberFormat, shape: torch.Size = SHAPE) -> QuantizedWeight:
    """A random weight on a grid. The upper rows are positive, so their zero points are the lowest code."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[: len(weight) // 4] = weight[: len(weight) // 4].abs()
    return rtn(weight, format.for_range(float(weight.abs().max())).for_inputs(3.0), "minmax", torch.float16)


@pytest.mark.parametrize("exporter", EXPORTERS.values(), ids=EXPORTERS)
@pytest.mark.parametrize("format", every_format().values(), ids=every_format())
def test_reading_is_the_inverse_of_writing(exporter: Exporter, format: NumberFormat, tmp_path: Path) -> None:
    try:
        exporter.check(FAMILIES["bert"], [format])
    except ConfigError:
        assert "compressed-tensors" not in exporter.tags
        return
    weight = random_weight(format)
    layout, files = stored(tmp_path, exporter, weight)
    assert (layout.format_of(LINEAR), layout.format_of("head")) == (format if exporter.packs else None, None)
    expected = layout.expected(LINEAR, SHAPE, signed=False)
    infos = {name: (info.shape, info.dtype) for name, info in files.infos.items()}
    assert infos == {name: (tensor.shape, tensor.dtype or infos[name][1]) for name, tensor in expected.items()}
    assert [tensor.check(files.tensor(name)) for name, tensor in expected.items()] == [None] * len(expected)
    if exporter.packs:
        found = layout.read(files, LINEAR, SHAPE, CPU)
        assert torch.equal(found.codes.float(), weight.codes.float())
        assert torch.equal(found.grid.scale, weight.grid.scale)
        assert torch.equal(found.grid.zeros, weight.grid.zeros)
        assert torch.equal(found.dequantize(), weight.dequantize())
        assert found.format == weight.format
        assert found.dtype == weight.dtype or format.scale_bits is not None
    else:
        assert torch.equal(files.tensor(f"{LINEAR}.weight").float(), weight.dequantize())


def test_a_group_larger_than_the_inputs_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for exporter in (exporter for exporter in EXPORTERS.values() if exporter.packs):
        _, files = stored(tmp_path, exporter, random_weight(ints(4, 16)))
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"group_size": 16', '"group_size": 1024'))
        with pytest.raises(CheckpointError, match=r"the tensors of layers.0.linear are not those that config.json"):
            layout_of(tmp_path).read(files, LINEAR, SHAPE, CPU)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("exporter", [e for e in EXPORTERS.values() if e.packs], ids=type)
def test_zero_points_of_few_rows_fill_one_word(exporter: Exporter, bits: int, rows: int, tmp_path: Path) -> None:
    weight = random_weight(ints(bits, 16, False), torch.Size((rows, 32)))
    layout, files = stored(tmp_path, exporter, weight)
    assert torch.equal(layout.read(files, LINEAR, weight.shape, CPU).grid.zeros, weight.grid.zeros)


@pytest.mark.parametrize("exporter", [e for e in EXPORTERS.values() if e.packs], ids=type)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "shape"),
    [
        (4, 16, True, (32, 128)),
        (4, 16, True, (24, 64)),
        (8, 16, True, (32, 64)),
        (4, -1, True, (32, 64)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_sentence(
    exporter: Exporter, bits: int, group_size: int, symmetric: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    stored(tmp_path, exporter, random_weight(ints(bits, group_size, symmetric), torch.Size(shape)))
    config = (tmp_path / "config.json").read_text()
    _, files = stored(tmp_path, exporter, random_weight(ints(4, 16)))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="the tensors of layers.0.linear are not those that config.json descri"):
        layout_of(tmp_path).read(files, LINEAR, torch.Size(shape), CPU)


@pytest.mark.parametrize(
    "quantization",
    [
        [],
        {},
        {"quant_method": "awq"},
        {"quant_method": ["gptq"]},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": 5, "group_size": 16, "sym": True},
        {"quant_method": "gptq", "bits": 4, "group_size": "x", "sym": True},
        *(
            {
                **{"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq"},
                **{"block_name_to_quantize": "layers", **change},
            }
            for change in (
                {"checkpoint_format": "marlin"},
                {"desc_act": True},
                {"block_name_to_quantize": ""},
                {"block_name_to_quantize": None},
            )
        ),
        {"quant_method": "compressed-tensors", "ignore": []},
        {"quant_method": "compressed-tensors", "ignore": [], "config_groups": {"a": {"targets": ["Linear"]}}},
    ],
)
def test_a_foreign_config_is_refused_in_one_sentence(quantization: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"config.json has a quantization_config that epmq does not write; give"):
        layout_of(tmp_path).format_of(LINEAR)
