"""Oracle: the weights that were added, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.calibrate.progress_file import write_tensors
from epmq_cli.calibrate.weight_sink import Weight, WeightSink, stored
from epmq_cli.errors import RunError
from epmq_cli.quantize.formats.format import DenseWeight, Grid, QuantizedWeight
from tests.helpers.formats import ints


def quantized(symmetric: bool) -> QuantizedWeight:
    codes = torch.arange(16).reshape(2, 8).to(ints(4, 4, symmetric).storage)
    zero = None if symmetric else torch.full((2, 2), 3.0)
    return QuantizedWeight(codes, Grid(torch.full((2, 2), 0.5), zero), ints(4, 4, symmetric), torch.float16)


def test_weights_in_a_file_keep_their_order_and_values(tmp_path: Path) -> None:
    weights: dict[str, Weight] = {"b": quantized(True), "dense": DenseWeight(torch.randn(2, 8)), "a": quantized(False)}
    sink, path = WeightSink(), tmp_path / "section.safetensors"
    for name, weight in weights.items():
        sink.add(name, weight)
    tensors, headers = stored(weights)
    dense = {"tensor.dense.weight": weights["dense"].dequantize()}
    write_tensors(path, tensors | dense, {"weights": headers})
    sink.move(["b", "dense"], path)
    assert list(sink) == ["b", "dense", "a"]
    assert list(sink.in_memory()) == ["a"]
    sink.move(["a"], path)
    for name, weight in weights.items():
        assert type(sink[name]) is type(weight)
        assert torch.equal(sink[name].dequantize(), weight.dequantize())


def test_a_weight_in_a_damaged_file_is_refused(tmp_path: Path) -> None:
    sink, path = WeightSink(), tmp_path / "section.safetensors"
    write_tensors(path, {"codes.a": torch.zeros(1)}, {"weights": {}})
    sink.move(["a"], path)
    with pytest.raises(RunError, match="section.safetensors is damaged"):
        sink["a"]
