"""Writes a checkpoint of epmq as one GGUF file, for llama.cpp and the programs that are built on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq_cli.checkpoint.calibrated_scales import expected_cache
from epmq_cli.checkpoint.expected_tensors import described_model
from epmq_cli.checkpoint.gguf import blocks
from epmq_cli.checkpoint.gguf.architectures import (
    architecture_of,
    heads_of,
    interleaved,
    metadata,
    rotary_factors,
)
from epmq_cli.checkpoint.gguf.blocks import quantized
from epmq_cli.checkpoint.gguf.tokenizer import write_tokenizer
from epmq_cli.checkpoint.layouts import layout_of
from epmq_cli.checkpoint.load import quantized_linears
from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.models.model_folder import model_files, read_json
from epmq_cli.quantize.formats.format import Grid, QuantizedWeight
from epmq_cli.runtime.progress import track
from epmq_cli.store.atomic import atomic_file

BYTES = np.dtype(np.uint8)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its name, GGML's name of its type, its shape (out, in), and its values when they are
    written."""

    name: str
    kind: str
    shape: tuple[int, ...]
    values: Callable[[], Any]


@dataclass(frozen=True)
class Summary:
    """The bytes of a file, the linears whose blocks are epmq's own codes, and the largest error in steps of the grid
    that float16 adds to their weights."""

    size: int
    linears: int
    rounding: float


class GgufFile:
    """A checkpoint folder as tensors and metadata of GGUF.

    `dense`: how matrices are stored that epmq did not quantize, such as embeddings: f16, bf16, f32 or q8_0; vectors are
    f32. ConfigError if llama.cpp has no such model, tokenizer or blocks; CheckpointError if epmq
    did not write the folder.
    """

    def __init__(self, folder: Path, dense: str) -> None:
        import gguf

        self.folder, self._dense = folder, dense.upper()
        self._config = read_json(folder, "config.json", "checkpoint")
        self._architecture = architecture_of(self._config)
        self._files = model_files(folder, "checkpoint")
        self._layout, self._rounding = layout_of(folder), 0.0
        model = described_model(folder, self._files)
        self._beside = expected_cache(folder, model)  # llama.cpp has no place for them
        formats = quantized_linears(folder, model, self._files, self._layout)
        self._shapes = {name: model.get_parameter(f"{name}.weight").shape for name in formats}
        for name, format in formats.items():
            blocks.check_blocks(name, self._shapes[name][1], format)
        self._kinds = {name: blocks.kind_of(format) for name, format in formats.items()}
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture.name)
        self._names = gguf.get_tensor_name_map(arch, self._config["num_hidden_layers"])

    def write(self, path: Path, title: str | None = None) -> Summary:
        """Writes the file, which gets its name when it is complete. `title`: of the model; by default the name of the
        run folder."""
        tensors = list(self._tensors())
        try:
            with atomic_file(path) as temporary:
                own = title or self.folder.resolve().parent.name
                about = self._config, self.folder
                writer = header(temporary, self._architecture.name, tensors, own, self._file_type(), about)
                for tensor in track(tensors, "write GGUF"):
                    writer.write_tensor_data(tensor.values())
                writer.close()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error}); free some space or choose another file"
            ) from error
        return Summary(path.stat().st_size, len(self._kinds), self._rounding)

    def _tensors(self) -> Iterator[Stored]:
        """All tensors, in the order of the checkpoint."""
        parts = {
            part: name
            for name, shape in self._shapes.items()
            for part in self._layout.expected(name, shape, signed=True)
        }
        done = {*self._beside}
        for stored in self._files.infos:
            name = parts.get(stored, stored)
            if name in done:
                continue
            done.add(name)
            if name in self._kinds:
                own, shape = self._name(f"{name}.weight"), tuple(self._shapes[name])
                yield Stored(own, self._kinds[name], shape, partial(self._blocks, name))
            else:
                shape = self._files.infos[name].shape
                kind = dense_kind(shape, self._dense)
                yield Stored(self._name(name), kind, shape, partial(self._dense_tensor, name, kind))
        if (factors := rotary_factors(self._config)) is not None:
            yield Stored("rope_freqs.weight", "F32", tuple(factors.shape), lambda: quantized(factors, "F32"))

    def _blocks(self, name: str) -> Any:
        """The blocks of a quantized linear."""
        weight = self._layout.read(self._files, name, self._shapes[name], CPU)
        error = blocks.rounding(weight)
        if error == math.inf:
            raise ConfigError(f"GGUF holds scales of float16, and those of {name} do not fit; use pack.dtype=float16")
        self._rounding = max(self._rounding, error)
        heads = self._heads(f"{name}.weight")
        if heads:
            rows = interleaved(torch.arange(len(weight.codes)), heads)
            zero = None if weight.grid.zero is None else weight.grid.zero[rows]
            grid = Grid(weight.grid.scale[rows], zero)
            weight = QuantizedWeight(weight.codes[rows], grid, weight.format, weight.dtype)
        return blocks.packed(weight).numpy()

    def _dense_tensor(self, name: str, kind: str) -> Any:
        """A tensor that is not quantized."""
        tensor, heads = self._files.tensor(name).float(), self._heads(name)
        if name.endswith("norm.weight"):
            tensor = tensor + self._architecture.offset
        return quantized(interleaved(tensor, heads) if heads else tensor, kind)

    def _heads(self, name: str) -> int:
        return heads_of(name, self._config) if self._architecture.interleaved else 0

    def _name(self, name: str) -> str:
        """llama.cpp's name of a tensor."""
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"llama.cpp has no tensor {name} in models of the kind {self._architecture.name}")
        return str(found)

    def _file_type(self) -> int:
        """The type of most linears, for display."""
        from gguf import LlamaFileType

        kinds = [*self._kinds.values()]
        most = max(sorted(set(kinds)), key=kinds.count) if kinds else self._dense
        name = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S"}.get(most, f"MOSTLY_{most}")
        return int(LlamaFileType[name])


def header(
    path: Path,
    architecture: str,
    tensors: Sequence[Stored],
    title: str,
    file_type: int,
    about: tuple[Mapping[str, Any], Path],
) -> Any:
    """The package gguf's writer of a file that holds all but the tensors' values. `file_type`: GGML's, of most tensors;
    `about`: the content of config.json, and the folder of the tokenizer."""
    import gguf

    config, folder = about
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(title)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata(writer, config)
    write_tokenizer(writer, folder, config["vocab_size"])
    for tensor in tensors:
        size, kind = byte_shape(tensor), gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, size, BYTES, math.prod(size), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def byte_shape(tensor: Stored) -> tuple[int, ...]:
    """The shape (out, bytes) of a stored tensor."""
    import gguf

    return tuple(gguf.quants.quant_shape_to_byte_shape(tensor.shape, gguf.GGMLQuantizationType[tensor.kind]))


def dense_kind(shape: tuple[int, ...], dense: str) -> str:
    """GGML's type of a tensor that is not quantized; float16 where a row does not fill the blocks of `dense`."""
    if len(shape) < 2:
        return "F32"
    return "F16" if dense == "Q8_0" and shape[-1] % blocks.BLOCK else dense
