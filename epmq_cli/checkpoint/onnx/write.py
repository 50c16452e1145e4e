"""Writes an encoder of a checkpoint as one ONNX file, for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import embedding

from epmq_cli.checkpoint.expected_tensors import described_model
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.load import load, quantized_linears
from epmq_cli.checkpoint.onnx.blocks import LEVELS, BlockLinear, check_blocks
from epmq_cli.checkpoint.onnx.towers import axes, example, tower_of
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.models.model_folder import SafetensorsFiles, dtype_of, read_json
from epmq_cli.store.atomic import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
LIMIT = 2**31  # bytes of a file of protobuf


@dataclass(frozen=True)
class Summary:
    """The linears whose blocks are epmq's own codes, and the names of the graph's inputs and outputs."""

    linears: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Table(nn.Module):
    """A table of tokens in the type of the checkpoint, whose rows become float32 when they are read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers of rows (...) -> rows (..., width)."""
        return embedding(numbers, self.get_buffer("weight")).float()


class OnnxFile:
    """A tower of a checkpoint folder as a graph of ONNX.

    `tower`: vision or text, None for the model's first. `activations`: the type in which quantized linears multiply,
    float32 or int8. ConfigError if ONNX Runtime has no operator for the linears, or the model is not an encoder.
    """

    def __init__(self, folder: Path, tower: str | None = None, activations: str = "float32") -> None:
        self.folder, self._level = folder, LEVELS[activations]
        self._tower = tower_of(read_json(folder, "config.json", "checkpoint"), tower)
        self._files, self._layout = SafetensorsFiles(folder, "checkpoint"), layout_of(folder)
        model = described_model(folder, self._files)
        formats = quantized_linears(folder, model, self._files, self._layout)
        self._shapes = {name: model.get_parameter(f"{name}.weight").shape for name in formats}
        for name, format in formats.items():
            check_blocks(name, self._shapes[name][1], format)

    def write(self, path: Path) -> Summary:
        """Writes the file, which gets its name when it is complete."""
        model: Any = load(self.folder, "cpu", "dequantize", torch.float32)
        inputs = example(self._tower, model.config)
        self._replace(model)
        module = self._tower.module(model).eval()
        if sum(each.nbytes for each in [*module.parameters(), *module.buffers()]) >= LIMIT:
            raise ConfigError(f"an ONNX file holds less than 2 GB, and {self.folder} has more; use bits=4 or bits=2")
        outputs = module.outputs
        program = self._program(module, inputs, outputs)
        try:
            with atomic_file(path) as temporary:
                program.save(temporary, external_data=False)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error}); free some space or choose another file"
            ) from error
        linears = sum(isinstance(each, BlockLinear) for each in module.modules())
        return Summary(linears, tuple(inputs), outputs)

    def _program(self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Any:
        """The graph, without the traces of source code that torch adds, which name folders of this machine."""
        with warnings.catch_warnings(), log_errors_only("onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")  # of the exporter: axes that share a name, and its own deprecations
            program: Any = torch.onnx.export(
                module,
                kwargs=dict(inputs),
                dynamic_shapes={name: axes(self._tower) for name in inputs},
                output_names=list(outputs),
                dynamo=True,
                verbose=False,
            )
        graph = program.model.graph
        for part in [program.model, graph, *graph.all_nodes()]:
            part.metadata_props.clear()
            part.doc_string = None
        for node in graph.all_nodes():
            for value in node.outputs:
                value.metadata_props.clear()
        return program

    def _replace(self, model: Any) -> None:
        """Puts blocks in place of quantized linears, and a table of tokens in the type of the files."""
        vocabulary = getattr(getattr(model.config, "text_config", model.config), "vocab_size", None)
        for name, module in list(model.named_modules()):
            if name in self._shapes:
                weight = self._layout.read(self._files, name, self._shapes[name], CPU)
                model.set_submodule(name, BlockLinear(weight, module.bias, self._level))
            elif isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary:
                dtype = dtype_of(self._files.infos[f"{name}.weight"].dtype)
                model.set_submodule(name, Table(module.weight.detach().to(dtype)))


@contextmanager
def log_errors_only(*names: str) -> Iterator[None]:
    """Keeps warnings of these loggers out of our output."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
