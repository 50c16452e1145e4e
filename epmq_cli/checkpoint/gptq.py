"""`pack=gptq`: the checkpoint format of AutoGPTQ and GPTQModel.

The weight of a linear `name` (out, in) is stored as
- `name.qweight` int32 (in * bits / 32, out): the codes u = q + 2^(bits-1), packed along the inputs, lowest bits first
  and without gaps, so that codes of 3 bits cross words;
- `name.qzeros` int32 (groups, out * bits / 32): the zero points, packed along the outputs. `gptq` stores each minus
  one, `gptq_v2` stores it as it is;
- `name.scales` (groups, out);
- `name.g_idx` int32 (in,): the group of each input. Groups of epmq are runs of neighbouring inputs, even
  with `quant.act_order`, so `desc_act` is false.

Readers of `gptq` add one to a stored zero point in a wider type, so that a zero point u = 0 comes back as 2^bits
(https://github.com/ModelCloud/GPTQModel, convert_gptq_v1_to_v2_format_module). Groups without negative weights have
this zero point. They are stored mirrored, which changes no weight: (u - 0) s = (u' - z') s' with u' = 2^bits - 1 - u,
z' = 2^bits - 1, s' = -s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from epmq_cli import __version__
from epmq_cli.checkpoint.exporter import ExpectedTensor, foreign_config, scale_check, signed_scale, unfit, words
from epmq_cli.config.schema import Pack
from epmq_cli.config.validate import check_choice, check_range
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import Tensors, dtype_of
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.formats.names import labels
from epmq_cli.store.safetensors_writer import Entry

if TYPE_CHECKING:
    from torch import Tensor, nn

METHOD = "gptq"
FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""The bits and group sizes that GPTQModel loads."""
OTHER = "use pack=compressed_tensors"
BLOCK = re.compile(r"(.+?)\.\d+\.")


@dataclass(frozen=True)
class GptqExporter(Pack):
    """`pack=gptq`. `dtype`: float16 or bfloat16, the types of the kernels. `format`: the storage of zero points.
    `damping`: the quantizer's damping for quantize_config.json; None if it has none."""

    format: str
    damping: float | None

    packs: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("gptq",)
    requires: ClassVar[tuple[str, ...]] = ("optimum", "gptqmodel")
    open_clip: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("pack.dtype", self.dtype, ("float16", "bfloat16"))
        super().__post_init__()
        check_choice("pack.format", self.format, FORMATS)
        if self.damping is not None:
            check_range("pack.damping", self.damping, 0, 1)

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """See exporter.py."""
        if not formats:
            raise ConfigError("pack=gptq stores quantized weights, but no weight is quantized; use pack=dense")
        if family.reads != "texts":
            raise ConfigError(f"pack=gptq is loaded for text models only, this family reads {family.reads}; {OTHER}")
        if len(formats) > 1:
            names = " and ".join(labels(formats))
            raise ConfigError(f"pack=gptq stores one format for all linears, got {names}; {OTHER}, or one format")
        for format in formats:
            if not isinstance(format, IntFormat) or format.activations != "none":
                raise ConfigError(f"pack=gptq stores integers, got {format.name}; {OTHER}")
            if format.zero_points == "real":
                raise ConfigError(
                    "pack=gptq stores whole zero points, and those of this quantizer are real numbers; use "
                    "quant.zero_point=integer or pack=dense"
                )
            check_choice("bits with pack=gptq", format.bits, BITS)
            check_choice("group_size with pack=gptq", format.group_size, GROUP_SIZES)

    def check_linears(
        self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[NumberFormat]
    ) -> None:
        """See exporter.py."""
        from epmq_cli.models.routed_experts import routers  # modules: imports torch

        if any(routers(model)):
            raise ConfigError(f"pack=gptq stores no mixtures of experts, got a {type(model).__name__}; {OTHER}")
        prefixes = blocks_of(linears)
        if len(prefixes) != 1:
            raise ConfigError(
                f"pack=gptq is loaded for models with one stack of blocks, got {' and '.join(prefixes)}; {OTHER}"
            )
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith(f"{prefixes[0]}.") and name not in linears:
                raise ConfigError(f"pack=gptq stores all linears of a block, and {name} is not quantized; {OTHER}")
        for format in formats:
            multiple = 32 // gcd(32, format.bits)
            for name, shape in linears.items():
                if shape[0] % multiple or shape[1] % multiple:
                    raise ConfigError(
                        f"pack=gptq stores {format.bits} bits of weights whose inputs and outputs are multiples of "
                        f"{multiple}, got {name} with {shape[1]} inputs and {shape[0]} outputs; {OTHER}"
                    )

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py."""
        rows, columns = weight.shape
        bits, groups = weight.format.bits, weight.grid.scale.shape[1]
        stored = mirrored(weight) if self.format == "gptq" else weight
        less = int(self.format == "gptq")

        def qweight() -> Tensor:
            return packed(stored.codes.T, bits, 0)

        def qzeros() -> Tensor:
            return packed((stored.grid.zeros - less).T, bits, 1)

        def scales() -> Tensor:
            return stored.grid.scale.T.to(weight.dtype).contiguous()

        return [
            Entry(f"{name}.qweight", torch.int32, (words(columns, bits), rows), qweight),
            Entry(f"{name}.qzeros", torch.int32, (groups, words(rows, bits)), qzeros),
            Entry(f"{name}.scales", weight.dtype, (groups, rows), scales),
            Entry(f"{name}.g_idx", torch.int32, (columns,), partial(group_index, columns, columns // groups)),
        ]

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py. `block_name_to_quantize` names the modules whose linears are packed."""
        format = next(iter(weights.values())).format
        damping = {} if self.damping is None or not 0 < self.damping < 1 else {"damp_percent": self.damping}
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.format,
            "bits": format.bits,
            "group_size": format.group_size,
            "sym": format.zero_points == "none",
            "desc_act": False,
            "static_groups": False,
            "lm_head": False,
            **damping,
            "block_name_to_quantize": blocks_of(weights)[0],
            "meta": {"quantizer": [f"epmq:{__version__}"]},
        }

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """quantize_config.json, which AutoGPTQ and GPTQModel read before config.json."""
        return {"quantize_config.json": json.dumps(config, indent=2) + "\n"}


@dataclass(frozen=True)
class GptqLayout:
    """The linears in the blocks under `prefix`, all in one format; `zeros`: the storage of zero points, one of
    `FORMATS`."""

    format: IntFormat
    zeros: str
    prefix: str

    scale: ClassVar[str] = ".scales"
    plain: ClassVar[bool] = False

    def format_of(self, name: str) -> NumberFormat | None:
        """See exporter.py."""
        return self.format if name.startswith(f"{self.prefix}.") else None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py. Scales of mirrored groups are negative."""
        (rows, columns), bits = shape, self.format.bits
        size = group_columns(self.format, columns)
        groups = -(-columns // size)
        scale = signed_scale if self._mirrors else scale_check(self.format, signed)
        return {
            f"{name}.qweight": ExpectedTensor((words(columns, bits), rows), "I32"),
            f"{name}.qzeros": ExpectedTensor((groups, words(rows, bits)), "I32", partial(self._zeros_problem, rows)),
            f"{name}.scales": ExpectedTensor((groups, rows), check=scale),
            f"{name}.g_idx": ExpectedTensor((columns,), "I32", partial(_index_problem, size)),
        }

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """See exporter.py."""
        (rows, columns), bits = shape, self.format.bits
        size = group_columns(self.format, columns)
        groups = columns // size
        try:
            qweight, qzeros, scales, g_idx = (
                files.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            fits = qweight.shape == (words(columns, bits), rows) and qzeros.shape == (groups, words(rows, bits))
            fits = fits and scales.shape == (groups, rows) and torch.equal(g_idx, group_index(columns, size))
            fits = fits and qweight.dtype == qzeros.dtype == torch.int32
            dtype = dtype_of(files.infos[f"{name}.scales"].dtype)
        except (KeyError, RuntimeError):
            fits = False
        if not fits:
            raise unfit(name)
        codes = unpacked(qweight, bits, (columns, rows), 0).T.contiguous().to(device)
        zero = unpacked(qzeros, bits, (groups, rows), 1).T.float() + (self.zeros == "gptq")
        grid = Grid(
            scales.T.float().contiguous().to(device), zero.contiguous().to(device) if self._asymmetric else None
        )
        weight = QuantizedWeight(codes, grid, self.format, dtype)
        return unmirrored(weight) if self._mirrors else weight

    def _zeros_problem(self, rows: int, qzeros: Tensor) -> str | None:
        """The problem with the zero points of a symmetric format, which must be 0."""
        zero = unpacked(qzeros, self.format.bits, (len(qzeros), rows), 1) + (self.zeros == "gptq")
        return None if self._asymmetric or not zero.any() else "holds zero points, config.json implies none"

    @property
    def _asymmetric(self) -> bool:
        return self.format.zero_points != "none"

    @property
    def _mirrors(self) -> bool:
        return self._asymmetric and self.zeros == "gptq"


def layout(folder: Path, quantization: Mapping[str, Any]) -> GptqLayout:
    """The layout that a quantization_config of config.json describes; CheckpointError if epmq did not write it."""
    try:
        points: Literal["none", "whole"] = "none" if quantization["sym"] else "whole"
        check_choice("bits", quantization["bits"], BITS)
        format = IntFormat(quantization["bits"], quantization["group_size"], points)
        zeros, prefix = quantization["checkpoint_format"], quantization["block_name_to_quantize"]
    except (KeyError, TypeError, ConfigError) as error:
        raise foreign_config(folder) from error
    if zeros not in FORMATS or not isinstance(prefix, str) or not prefix or quantization.get("desc_act"):
        raise foreign_config(folder)
    return GptqLayout(format, zeros, prefix)


def mirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight without a zero point at the lowest code: such groups get the codes ~q, the zero point ~z and the
    scale -s."""
    return _mirror(weight, weight.grid.zeros == -(1 << (weight.format.bits - 1)))


def unmirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `mirrored`, for weights with zero points, whose scales are positive otherwise."""
    return _mirror(weight, weight.grid.scale < 0)


def _mirror(weight: QuantizedWeight, groups: Tensor) -> QuantizedWeight:
    """The weight with the groups that `groups` (out, groups) names mirrored; ~q is -1 - q."""
    if not groups.any():
        return weight
    columns = groups.repeat_interleave(group_columns(weight.format, weight.shape[1]), 1)
    other = Grid(-weight.grid.scale, -1 - weight.grid.zeros)
    codes = torch.where(columns, ~weight.codes, weight.codes)
    return QuantizedWeight(codes, other.where(groups, weight.grid), weight.format, weight.dtype)


def packed(signed: Tensor, bits: int, dim: Literal[0, 1]) -> Tensor:
    """Integers -2^(bits-1) .. 2^(bits-1) - 1 as codes of `bits` bits in int32, packed along `dim`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored: Tensor = pack_to_int32(signed.to(torch.int8).cpu(), bits, packed_dim=dim)
    return stored


def unpacked(stored: Tensor, bits: int, shape: tuple[int, int], dim: Literal[0, 1]) -> Tensor:
    """The integers int8 of this shape that `packed` packed."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if dim == 0:  # along the last axis: compressed-tensors cannot unpack a single row of int32 along the first
        return unpacked(stored.T, bits, (shape[1], shape[0]), 1).T
    stored = stored.clone(memory_format=torch.contiguous_format)  # an axis of length 1 may have any stride
    integers: Tensor = unpack_from_int32(stored, bits, torch.Size(shape), packed_dim=1)
    return integers


def group_index(columns: int, size: int) -> Tensor:
    """The group of each input, in groups of `size`: int32 (columns,)."""
    return torch.arange(columns, dtype=torch.int32) // size


def _index_problem(size: int, tensor: Tensor) -> str | None:
    same = torch.equal(tensor, group_index(len(tensor), size))
    return None if same else f"does not put {size} neighbouring inputs into each group"


def blocks_of(names: Iterable[str]) -> list[str]:
    """The modules that hold the blocks of these linears, such as `model.layers`."""
    return sorted({match[1] for name in names if (match := BLOCK.match(name))})
