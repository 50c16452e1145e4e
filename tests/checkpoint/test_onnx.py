"""Oracles: transformers on the checkpoint, and the integers of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import epmq_cli
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.onnx.blocks import BlockLinear, block_size, check_blocks
from epmq_cli.checkpoint.onnx.write import OnnxFile
from epmq_cli.errors import ConfigError
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import BITS, IntFormat
from tests.conftest import Run
from tests.faults.driver import forked
from tests.helpers.byte_level import quantized, write_decoder
from tests.helpers.encoders import MODELS, PIXELS, ROWS, write_encoder

Points = Literal["none", "whole"]
BOUND = 1e-5
"""Of the largest error of an output, relative to its largest value."""


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a file by name."""
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def unpacked(packed: Any, bits: int) -> Tensor:
    """Unsigned integers (out, n) of bytes (out, ...), number by number."""
    rows = np.asarray(packed).reshape(len(packed), -1)
    mask = (1 << bits) - 1
    values = [[byte >> shift & mask for byte in row for shift in range(0, 8, bits)] for row in rows.tolist()]
    return torch.tensor(values)


def inputs_of(session: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Random inputs for a graph."""
    torch.manual_seed(rows)
    tokens = torch.randint(2, ROWS - 1, (rows, length))
    tokens[:, -1] = ROWS - 1
    mask = torch.ones_like(tokens)
    mask[-1, : length // 3] = 0
    types = torch.randint(0, 2, tokens.shape)
    values = {
        "pixel_values": torch.randn(rows, 3, PIXELS, PIXELS),
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": types,
    }
    return {each.name: values[each.name] for each in session.get_inputs()}


def by_transformers(model: Any, inputs: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    """The outputs of these names."""
    with torch.inference_mode():
        if "image_embeds" in names:
            return [model.get_image_features(**inputs).pooler_output]
        if "text_embeds" in names:
            return [model.get_text_features(**inputs).pooler_output]
        found = model(**inputs)
        return [found[name] for name in names]


def written(folder: Path, file: Path, tower: str | None = None, activations: str = "float32") -> int:
    """Writes a file in a process of its own, because processes that torch's exporter ran in cannot be forked for a
    training, as other tests do. Returns the number of quantized linears."""
    assert forked(lambda: OnnxFile(folder, tower, activations).write(file)) == 0
    return len({node.input[1] for node in onnx.load(file).graph.node if node.op_type == "MatMulNBits"})


def check_outputs(checkpoint: Path, file: Path, bound: float = BOUND) -> float:
    """Compares a file with transformers, for two batches of different shapes; returns the largest relative error."""
    model, session = epmq_cli.load(checkpoint, "cpu", "dequantize"), ort.InferenceSession(file)
    names, worst = [each.name for each in session.get_outputs()], 0.0
    for rows, length in ((1, 5), (3, 17)):
        inputs = inputs_of(session, rows, length)
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for own, wanted in zip(found, by_transformers(model, inputs, names), strict=True):
            assert own.shape == tuple(wanted.shape)
            worst = max(worst, float((torch.tensor(own) - wanted).abs().max() / wanted.abs().max()))
    assert worst < bound
    return worst


@pytest.mark.parametrize("points", ["none", "whole"])
@pytest.mark.parametrize("group_size", [16, 48, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_blocks_hold_the_integers_of_the_codes(bits: int, group_size: int, points: Points) -> None:
    columns = 192 if group_size > 0 else 200
    weight = quantized(
        torch.randn(6, columns, generator=torch.Generator().manual_seed(0)), IntFormat(bits, group_size, points)
    )
    linear = BlockLinear(weight, None, 1)
    width = {3: 4, 5: 8, 6: 8, 7: 8}.get(bits, bits)
    shift = 1 << (width - 1)
    assert linear.block == {16: 16, 48: 16, 64: 64, -1: 128}[group_size]
    codes = unpacked(linear.codes, width)
    assert torch.equal(codes[:, :columns] - shift, weight.codes.long())
    repeat = -(-columns // linear.block) // weight.grid.scale.shape[1]
    assert torch.equal(linear.scales, weight.grid.scale.repeat_interleave(repeat, 1))
    if points == "whole":
        found = unpacked(linear.points, width)[:, : linear.scales.shape[1]] - shift
        assert torch.equal(found, weight.grid.zeros.long().repeat_interleave(repeat, 1))
    else:
        assert linear.points is None


def test_a_file_holds_the_checkpoint_and_gives_its_outputs(tmp_path: Path, epmq: Run) -> None:
    folder, file = write_encoder(tmp_path, "clip", points="whole"), tmp_path / "model.onnx"
    done = epmq("export", str(folder), str(file))
    assert done.returncode == 0, done.stderr
    assert re.search(r"model.onnx: [\d.]+ kB, 6 quantized linears as in the checkpoint; inputs pixel", done.stdout)
    assert done.stderr == ""
    check_outputs(folder, file)
    layout, files, found = layout_of(folder), SafetensorsFiles(folder, "checkpoint"), stored(file)
    for name in ("self_attn.q_proj", "mlp.fc2"):
        weight = layout.read(
            files,
            f"vision_model.encoder.layers.0.{name}",
            torch.Size((64, 96 if "mlp" in name else 64)),
            torch.device("cpu"),
        )
        own = f"body.encoder.layers.0.{name}"
        assert torch.equal(unpacked(found[f"{own}.codes"], 4) - 8, weight.codes.long())
        assert torch.equal(torch.tensor(found[f"{own}.scales"]), weight.grid.scale)
        points = unpacked(found[f"{own}.points"], 4)[:, : weight.grid.scale.shape[1]] - 8
        assert torch.equal(points, weight.grid.zeros.long())
    assert str(Path(epmq_cli.__file__).parent).encode() not in file.read_bytes()  # torch adds traces of source code


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tower"), [(kind, None) for kind in MODELS] + [("clip", "text")])
def test_every_encoder_gives_the_outputs_of_transformers(kind: str, tower: str | None, tmp_path: Path) -> None:
    folder, file = write_encoder(tmp_path, kind), tmp_path / "model.onnx"
    assert written(folder, file, tower) == (4 if kind == "modernbert" else 6)
    check_outputs(folder, file)


GRIDS = [(bits, 32, points) for bits in BITS for points in ("none", "whole")]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size", "points"), [*GRIDS, (4, 16, "none"), (4, -1, "whole"), (2, -1, "none")])
def test_every_grid_gives_the_outputs_of_transformers(
    bits: int, group_size: int, points: Points, tmp_path: Path
) -> None:
    folder, file = write_encoder(tmp_path, "bert", bits, points, group_size), tmp_path / "model.onnx"
    written(folder, file)
    check_outputs(folder, file)


@pytest.mark.slow
def test_dense_checkpoints_and_int8_activations(tmp_path: Path) -> None:
    folder, file = write_encoder(tmp_path, "bert", pack="dense"), tmp_path / "model.onnx"
    assert written(folder, file) == 0
    check_outputs(folder, file)
    packed = write_encoder(tmp_path / "packed", "bert")
    written(packed, file, activations="int8")
    assert check_outputs(packed, file, bound=0.1) > BOUND


def test_what_onnx_runtime_cannot_run_is_refused(tmp_path: Path, epmq_inside: Run) -> None:
    folder, file = write_decoder(tmp_path, "llama"), tmp_path / "model.onnx"
    done = epmq_inside("export", str(folder), str(file))
    assert "got the model type llama; llama.cpp (a file in .gguf) and vLLM are for decoders" in done.stderr
    assert (
        "--dense is for files whose names end in .gguf"
        in epmq_inside("export", str(folder), str(file), "--dense=f16").stderr
    )
    encoder = write_encoder(tmp_path / "encoder", "vit")
    done = epmq_inside("export", str(encoder), str(file), "--tower=text")
    assert "--tower must be one of vision for a model of the type vit, got text" in done.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (IntFormat(4, 8, "none"), "groups that are multiples of 16 inputs, got 8 in layer"),
        (IntFormat(4, 32, "real"), "holds integers, got int4 in layer"),
        (Fp8Format(-1), "got fp8 in layer"),
    ],
)
def test_grids_without_blocks_are_refused(format: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_blocks("layer", 64, format)


def test_a_row_of_one_group_fills_its_last_block() -> None:
    assert [block_size(columns, IntFormat(4, -1, "none")) for columns in (8, 48, 200)] == [16, 64, 128]
