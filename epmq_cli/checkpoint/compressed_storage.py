"""The tensors in which compressed-tensors stores a quantized weight: its codes and its scales
(https://github.com/vllm-project/compressed-tensors, compressors/)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from epmq_cli.checkpoint.compressed_schemes import storage_name
from epmq_cli.checkpoint.exporter import ExpectedTensor, equal_to, scale_check, words
from epmq_cli.models.model_folder import Tensors, dtype_of
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.microscaling import Nvfp4Format
from epmq_cli.store.safetensors_writer import Entry, of

if TYPE_CHECKING:
    from torch import Tensor

MANTISSA = 23  # bits of float32 below its exponent, which has the bias of E8M0


class Codes(Protocol):
    """Stores the codes (out, in) of a weight, and its zero points."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """The tensors, each computed when it is written."""

    def expected(self, name: str, shape: torch.Size, format: NumberFormat) -> dict[str, ExpectedTensor]:
        """The tensors of a weight of this shape."""

    def read(self, files: Tensors, name: str, shape: torch.Size, format: NumberFormat) -> tuple[Tensor, Tensor | None]:
        """Codes (out, in) and zero points (out, groups)."""


class Scales(Protocol):
    """Stores the scales (out, groups) of a weight."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """The tensors."""

    def expected(self, name: str, shape: torch.Size, format: NumberFormat, signed: bool) -> dict[str, ExpectedTensor]:
        """The tensors of scales of this shape; `signed`: whether they may be negative."""

    def read(self, files: Tensors, name: str, format: NumberFormat) -> tuple[Tensor, NumberFormat, torch.dtype]:
        """The scales by which readers multiply in float32, the format of this tensor, and the type that its weights are
        exact in."""


class PlainCodes:
    """Codes as they are: int8 or FP8."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Codes."""
        return [of(f"{name}.weight", weight.codes)]

    def expected(self, name: str, shape: torch.Size, format: NumberFormat) -> dict[str, ExpectedTensor]:
        """See Codes."""
        kind = "I8" if format.storage == torch.int8 else "F8_E4M3"
        return {f"{name}.weight": ExpectedTensor((shape[0], shape[1]), kind)}

    def read(self, files: Tensors, name: str, shape: torch.Size, format: NumberFormat) -> tuple[Tensor, Tensor | None]:
        """See Codes."""
        return files.tensor(f"{name}.weight"), None


class PackedIntegers:
    """Integers and their zero points, without gaps in int32."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Codes."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits, codes, zero = weight.format.bits, weight.codes, weight.grid.zero
        shape = (len(codes), words(codes.shape[1], bits))
        entries = [
            Entry(f"{name}.weight_packed", torch.int32, shape, lambda: pack_to_int32(codes.cpu(), bits)),
            of(f"{name}.weight_shape", torch.tensor(codes.shape)),
        ]
        if zero is not None:
            points = pack_to_int32(zero.to(torch.int8).cpu(), bits, packed_dim=0).contiguous()
            entries.append(of(f"{name}.weight_zero_point", points))
        return entries

    def expected(self, name: str, shape: torch.Size, format: NumberFormat) -> dict[str, ExpectedTensor]:
        """See Codes."""
        rows, columns = shape
        tensors = {
            f"{name}.weight_packed": ExpectedTensor((rows, words(columns, format.bits)), "I32"),
            f"{name}.weight_shape": ExpectedTensor((2,), "I64", partial(equal_to, [rows, columns])),
        }
        if format.zero_points != "none":
            points = (words(rows, format.bits), columns // group_columns(format, columns))
            tensors[f"{name}.weight_zero_point"] = ExpectedTensor(points, "I32")
        return tensors

    def read(self, files: Tensors, name: str, shape: torch.Size, format: NumberFormat) -> tuple[Tensor, Tensor | None]:
        """See Codes."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes = unpack_from_int32(files.tensor(f"{name}.weight_packed"), format.bits, shape)
        if format.zero_points == "none":
            return codes, None
        # along rows: compressed-tensors 0.20 cannot view a single word of them in bytes
        points = files.tensor(f"{name}.weight_zero_point").T.clone(memory_format=torch.contiguous_format)
        transposed = torch.Size([shape[1] // group_columns(format, shape[1]), shape[0]])
        return codes, unpack_from_int32(points, format.bits, transposed).T


class PackedFloats:
    """Numbers of 4 or 6 bits in bytes: two in one byte, or four in three."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Codes."""
        from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
        from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

        rows, columns = weight.shape
        pack = pack_fp4_to_uint8 if weight.format.bits == 4 else pack_fp6_to_uint8
        shape = (rows, columns * weight.format.bits // 8)
        return [Entry(f"{name}.weight_packed", torch.uint8, shape, lambda: pack(weight.codes.cpu().float()))]

    def expected(self, name: str, shape: torch.Size, format: NumberFormat) -> dict[str, ExpectedTensor]:
        """See Codes."""
        return {f"{name}.weight_packed": ExpectedTensor((shape[0], shape[1] * format.bits // 8), "U8")}

    def read(self, files: Tensors, name: str, shape: torch.Size, format: NumberFormat) -> tuple[Tensor, Tensor | None]:
        """See Codes."""
        from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        unpack = unpack_fp4_from_uint8 if format.bits == 4 else unpack_fp6_from_uint8
        packed = files.tensor(f"{name}.weight_packed")
        return unpack(packed, shape[0], shape[1], torch.float32).to(format.storage), None


class StoredScales:
    """Scales in the type of the checkpoint; of rows that share them, the first row's."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Scales."""
        scale = weight.grid.scale[:: weight.format.row_block]
        return [Entry(f"{name}.weight_scale", weight.dtype, tuple(scale.shape), lambda: scale.to(weight.dtype))]

    def expected(self, name: str, shape: torch.Size, format: NumberFormat, signed: bool) -> dict[str, ExpectedTensor]:
        """See Scales."""
        blocks = -(-shape[0] // format.row_block)
        return {f"{name}.weight_scale": ExpectedTensor((blocks, shape[1]), check=scale_check(format, signed))}

    def read(self, files: Tensors, name: str, format: NumberFormat) -> tuple[Tensor, NumberFormat, torch.dtype]:
        """See Scales."""
        stored = files.tensor(f"{name}.weight_scale").float()
        if format.row_block > 1:
            stored = stored.repeat_interleave(format.row_block, 0)[: files.infos[f"{name}.weight"].shape[0]]
        return stored, format, dtype_of(files.infos[f"{name}.weight_scale"].dtype)


class PowersOfTwo:
    """The exponents of scales that are powers of two (E8M0)."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Scales."""
        scale = weight.grid.scale

        def exponents() -> Tensor:
            return (scale.contiguous().view(torch.int32) >> MANTISSA).to(torch.uint8)

        return [Entry(f"{name}.weight_scale", torch.uint8, tuple(scale.shape), exponents)]

    def expected(self, name: str, shape: torch.Size, format: NumberFormat, signed: bool) -> dict[str, ExpectedTensor]:
        """See Scales."""
        return {f"{name}.weight_scale": ExpectedTensor(tuple(shape), "U8", exponent)}

    def read(self, files: Tensors, name: str, format: NumberFormat) -> tuple[Tensor, NumberFormat, torch.dtype]:
        """See Scales."""
        exponents = files.tensor(f"{name}.weight_scale").int()
        return (exponents << MANTISSA).view(torch.float32), format, torch.bfloat16


class TwoLevels:
    """E4M3 scales, and the global scale that they are divided by."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See Scales."""
        scale, format = weight.grid.scale, weight.format
        assert isinstance(format, Nvfp4Format)
        own = format.global_scale
        return [
            Entry(
                f"{name}.weight_scale",
                torch.float8_e4m3fn,
                tuple(scale.shape),
                lambda: (scale * own).to(torch.float8_e4m3fn),
            ),
            of(f"{name}.weight_global_scale", torch.tensor([own])),
        ]

    def expected(self, name: str, shape: torch.Size, format: NumberFormat, signed: bool) -> dict[str, ExpectedTensor]:
        """See Scales."""
        check = scale_check(format, signed)
        return {
            f"{name}.weight_scale": ExpectedTensor(tuple(shape), "F8_E4M3", check),
            f"{name}.weight_global_scale": ExpectedTensor((1,), "F32", check),
        }

    def read(self, files: Tensors, name: str, format: NumberFormat) -> tuple[Tensor, NumberFormat, torch.dtype]:
        """See Scales."""
        own = float(files.tensor(f"{name}.weight_global_scale"))
        assert isinstance(format, Nvfp4Format)
        scale = files.tensor(f"{name}.weight_scale").float() / own
        return scale, replace(format, global_scale=own), torch.bfloat16


def exponent(tensor: Tensor) -> str | None:
    """The problem with exponents of scales: 255 is not a number."""
    return "holds exponents of NaN" if (tensor == 255).any() else None


@dataclass(frozen=True)
class Storage:
    """How a format is stored."""

    codes: Codes
    scales: Scales


STORAGE = {
    "pack-quantized": Storage(PackedIntegers(), StoredScales()),
    "int-quantized": Storage(PlainCodes(), StoredScales()),
    "float-quantized": Storage(PlainCodes(), StoredScales()),
    "nvfp4-pack-quantized": Storage(PackedFloats(), TwoLevels()),
    "mxfp4-pack-quantized": Storage(PackedFloats(), PowersOfTwo()),
    "mxfp6-pack-quantized": Storage(PackedFloats(), PowersOfTwo()),
    "mxfp8-quantized": Storage(PlainCodes(), PowersOfTwo()),
}
"""By compressed-tensors' names."""


def storage_of(format: NumberFormat) -> Storage:
    """How a format is stored."""
    return STORAGE[storage_name(format)]
