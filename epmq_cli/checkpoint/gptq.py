"""`pack=gptq`: the checkpoint format of AutoGPTQ and GPTQModel.

The weight of a linear `name` (out, in) is stored as
- `name.qweight` int32 (in * bits / 32, out): the codes u = q + 2^(bits-1), packed along the inputs, lowest bits first
  and without gaps, so that codes of 3 bits cross words;
- `name.qzeros` int32 (groups, out * bits / 32): the zero points, packed along the outputs. `gptq` stores each minus
  one, `gptq_v2` stores it as it is;
- `name.scales` (groups, out);
- `name.g_idx` int32 (in,): the group of each input. A group of epmq is a run of neighbouring inputs, with
  `quant.act_order` too; therefore `desc_act` is false.

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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from epmq_cli import __version__
from epmq_cli.checkpoint.exporter import ExpectedTensor, foreign_config, positive_scale, signed_scale, unfit, words
from epmq_cli.config.schema import Pack
from epmq_cli.config.validate import check_choice
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import DTYPES, Tensors
from epmq_cli.quantize.formats.int import GridSpec, QuantizedWeight
from epmq_cli.store.safetensors_writer import Entry

METHOD = "gptq"
FORMATS = ("gptq", "gptq_v2")
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel loads."""
OTHER = "use pack=compressed_tensors"
BLOCK = re.compile(r"(.+?)\.\d+\.")


@dataclass(frozen=True)
class GptqExporter(Pack):
    """`pack=gptq`. `dtype`: float16 or bfloat16, since the kernels calculate in these. `format`: how zero points are
    stored. `damping`: that of the quantizer, which quantize_config.json repeats; None if it has none."""

    format: str
    damping: float | None

    packs: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("gptq",)
    requires: ClassVar[tuple[str, ...]] = ("optimum", "gptqmodel")

    def __post_init__(self) -> None:
        check_choice("pack.dtype", self.dtype, ("float16", "bfloat16"))
        super().__post_init__()
        check_choice("pack.format", self.format, FORMATS)

    def check(self, family: Family, formats: Collection[GridSpec]) -> None:
        """See exporter.py."""
        if not formats:
            raise ConfigError("pack=gptq stores quantized weights, and there are none; use pack=dense")
        if family.reads != "texts":
            raise ConfigError(f"pack=gptq is loaded for text models only, this family reads {family.reads}; {OTHER}")
        if len(formats) > 1:
            widths = " and ".join(str(spec.bits) for spec in formats)
            raise ConfigError(f"pack=gptq stores one width for all linears, got {widths} bits; {OTHER}, or one width")
        for spec in formats:
            check_choice("group_size with pack=gptq", spec.group_size, GROUP_SIZES)

    def check_linears(self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[GridSpec]) -> None:
        """See exporter.py."""
        prefixes = blocks_of(linears)
        if len(prefixes) != 1:
            raise ConfigError(
                f"pack=gptq is loaded for models with one stack of blocks, got {' and '.join(prefixes)}; {OTHER}"
            )
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(f"{prefixes[0]}.") and name not in linears:
                raise ConfigError(f"pack=gptq stores all linears of a block, and {name} is not quantized; {OTHER}")
        for spec in formats:
            multiple = 32 // gcd(32, spec.bits)
            for name, shape in linears.items():
                if shape[0] % multiple or shape[1] % multiple:
                    raise ConfigError(
                        f"pack=gptq stores {spec.bits} bits of weights whose inputs and outputs are multiples of "
                        f"{multiple}, got {name} with {shape[1]} inputs and {shape[0]} outputs; {OTHER}"
                    )

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py."""
        rows, columns = weight.values.shape
        bits, groups = weight.spec.bits, weight.scale.shape[1]
        stored = mirrored(weight) if self.format == "gptq" else weight
        less = int(self.format == "gptq")

        def qweight() -> Tensor:
            return packed(stored.values.T, bits, 0)

        def qzeros() -> Tensor:
            return packed((stored.zero - less).T, bits, 1)

        def scales() -> Tensor:
            return stored.scale.T.to(weight.dtype).contiguous()

        return [
            Entry(f"{name}.qweight", torch.int32, (words(columns, bits), rows), qweight),
            Entry(f"{name}.qzeros", torch.int32, (groups, words(rows, bits)), qzeros),
            Entry(f"{name}.scales", weight.dtype, (groups, rows), scales),
            Entry(f"{name}.g_idx", torch.int32, (columns,), partial(group_index, columns, columns // groups)),
        ]

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py. `block_name_to_quantize` tells transformers which linears are packed."""
        spec = next(iter(weights.values())).spec
        damping = {} if self.damping is None or not 0 < self.damping < 1 else {"damp_percent": self.damping}
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.format,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
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
    """The linears in the blocks under `prefix`, all on grids like `spec`; `format`: how zero points are stored."""

    spec: GridSpec
    format: str
    prefix: str

    codes: ClassVar[str] = ".qweight"
    plain: ClassVar[bool] = False

    def format_of(self, name: str) -> GridSpec | None:
        """See exporter.py."""
        return self.spec if name.startswith(f"{self.prefix}.") else None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py. Scales of mirrored groups are negative."""
        (rows, columns), bits = shape, self.spec.bits
        size = self.spec.columns(columns)
        groups = -(-columns // size)
        scale = signed_scale if self._mirrors or (signed and self.spec.symmetric) else positive_scale
        return {
            f"{name}.qweight": ExpectedTensor((words(columns, bits), rows), "I32"),
            f"{name}.qzeros": ExpectedTensor((groups, words(rows, bits)), "I32"),
            f"{name}.scales": ExpectedTensor((groups, rows), check=scale),
            f"{name}.g_idx": ExpectedTensor((columns,), "I32", partial(_index_problem, size)),
        }

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """See exporter.py."""
        (rows, columns), bits = shape, self.spec.bits
        size = self.spec.columns(columns)
        groups = columns // size
        try:
            qweight, qzeros, scales, g_idx = (
                files.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            fits = qweight.shape == (words(columns, bits), rows) and qzeros.shape == (groups, words(rows, bits))
            fits = fits and scales.shape == (groups, rows) and torch.equal(g_idx, group_index(columns, size))
            fits = fits and qweight.dtype == qzeros.dtype == torch.int32
            dtype = DTYPES[files.infos[f"{name}.scales"].dtype]
        except (KeyError, RuntimeError):
            fits = False
        if not fits:
            raise unfit(name)
        values = unpacked(qweight, bits, (columns, rows), 0).T.contiguous()
        zero = unpacked(qzeros, bits, (groups, rows), 1).T.float() + (self.format == "gptq")
        found = QuantizedWeight(
            values.to(device), scales.T.float().contiguous().to(device), zero.contiguous().to(device), self.spec, dtype
        )
        return unmirrored(found) if self._mirrors else found

    @property
    def _mirrors(self) -> bool:
        return self.format == "gptq" and not self.spec.symmetric


def layout(folder: Path, quantization: Mapping[str, Any]) -> GptqLayout:
    """The layout that a quantization_config of config.json describes; CheckpointError where epmq did not write it."""
    try:
        spec = GridSpec(quantization["bits"], quantization["group_size"], quantization["sym"], "minmax")
        form, prefix = quantization["checkpoint_format"], quantization["block_name_to_quantize"]
    except (KeyError, TypeError, ConfigError) as error:
        raise foreign_config(folder) from error
    if form not in FORMATS or not isinstance(prefix, str) or not prefix or quantization.get("desc_act"):
        raise foreign_config(folder)
    return GptqLayout(spec, form, prefix)


def mirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight without a zero point at the lowest code: such groups get the codes ~q, the zero point ~z and the
    scale -s."""
    return _mirror(weight, weight.zero == weight.spec.lowest)


def unmirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `mirrored`, for asymmetric grids, whose scales are positive otherwise."""
    return _mirror(weight, weight.scale < 0)


def _mirror(weight: QuantizedWeight, groups: Tensor) -> QuantizedWeight:
    """The weight with the groups that `groups` (out, groups) names mirrored; ~q is -1 - q."""
    if not groups.any():
        return weight
    columns = groups.repeat_interleave(weight.values.shape[1] // groups.shape[1], 1)
    return QuantizedWeight(
        torch.where(columns, ~weight.values, weight.values),
        torch.where(groups, -weight.scale, weight.scale),
        torch.where(groups, -1 - weight.zero, weight.zero),
        weight.spec,
        weight.dtype,
    )


def packed(signed: Tensor, bits: int, dim: Literal[0, 1]) -> Tensor:
    """Integers -2^(bits-1) .. 2^(bits-1) - 1 as codes of `bits` bits in int32, packed along `dim`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored: Tensor = pack_to_int32(signed.to(torch.int8).cpu(), bits, packed_dim=dim)
    return stored


def unpacked(stored: Tensor, bits: int, shape: tuple[int, int], dim: Literal[0, 1]) -> Tensor:
    """The integers int8 of this shape that `packed` packed."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    found: Tensor = unpack_from_int32(stored.contiguous(), bits, torch.Size(shape), packed_dim=dim)
    return found


def group_index(columns: int, size: int) -> Tensor:
    """The group of each input, in groups of `size`: int32 (columns,)."""
    return torch.arange(columns, dtype=torch.int32) // size


def _index_problem(size: int, tensor: Tensor) -> str | None:
    same = torch.equal(tensor, group_index(len(tensor), size))
    return None if same else f"does not put {size} neighbouring inputs into each group"


def blocks_of(names: Iterable[str]) -> list[str]:
    """The modules that hold the blocks of these linears, such as `model.layers`."""
    return sorted({found[1] for name in names if (found := BLOCK.match(name))})
