"""`pack=compressed_tensors`: all number formats as compressed-tensors stores them (compressed_storage.py), which
transformers loads without epmq (https://github.com/vllm-project/compressed-tensors).

vLLM 0.32 was tested on a CPU with decoders, BERT and CLIP. It loads unquantized checkpoints and 4 bits, in groups of
32, 64 or 128 inputs or with one scale per row, symmetric or not. It has no CPU kernels for 3, 8 and mixed bits. Its
sources have kernels for 8 bits (Marlin) and for all widths (Humming) on CUDA only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from epmq_cli.checkpoint.calibrated_scales import CACHE, expected_inputs, input_entries, with_input_scale
from epmq_cli.checkpoint.compressed_schemes import described, scheme_of, storage_name
from epmq_cli.checkpoint.compressed_storage import storage_of
from epmq_cli.checkpoint.exporter import (
    ExpectedTensor,
    foreign_config,
    unfit,
)
from epmq_cli.config.schema import OpenClipPack
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import Tensors
from epmq_cli.quantize.formats.format import Grid, NumberFormat, QuantizedWeight, group_columns
from epmq_cli.quantize.formats.names import by_size, labels
from epmq_cli.store.safetensors_writer import Entry

if TYPE_CHECKING:
    from torch import nn

METHOD = "compressed-tensors"


@dataclass(frozen=True)
class CompressedTensorsExporter(OpenClipPack):
    """`pack=compressed_tensors`. Weights that are not quantized are stored dense."""

    packs: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    requires: ClassVar[tuple[str, ...]] = ()
    cache_config: ClassVar[Mapping[str, Any]] = CACHE

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """See exporter.py."""
        if len(formats) > 1 and not family.mixes_formats:
            names = " and ".join(labels(formats))
            raise ConfigError(
                f"transformers cannot load this family with two formats in one checkpoint, got {names}; use one "
                "format, such as bits=4, or pack=dense"
            )
        if any(format.zero_points == "real" for format in formats):
            raise ConfigError(
                "pack=compressed_tensors stores whole zero points, and those of this quantizer are real numbers; use "
                "quant.zero_point=integer or pack=dense"
            )
        for format in formats:
            storage_name(format)  # rejects formats that it cannot store

    def check_linears(
        self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[NumberFormat]
    ) -> None:
        """See exporter.py."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """See exporter.py."""
        storage = storage_of(weight.format)
        own = [*storage.codes.entries(name, weight), *storage.scales.entries(name, weight)]
        return own + input_entries(name, weight.format)

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """See exporter.py. One group if all linears have the same format, else one for each.

        `dequantize` makes transformers dequantize while it loads. All but integers without zero points always need it:
        transformers fills tensors that the files lack, such as those of a pooler, with random numbers, which torch does
        not draw in FP8; and it does not round activations of models that it dequantizes. With several
        formats it must stay off, because transformers would use the first one for all.
        """
        from epmq_cli.models.routed_experts import routers  # modules: imports torch

        formats = {name: weight.format.for_range(0).for_inputs(0) for name, weight in weights.items()}
        if not formats:
            return {}
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        kinds = sorted(set(formats.values()), key=lambda format: (*by_size(format), format.name))
        names = list(dict.fromkeys(storage_name(format) for format in kinds))
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(kinds) == 1 else [name for name in linears if formats.get(name) == format],
                **scheme_of(format),
                **({"format": storage_name(format)} if len(names) > 1 else {}),
            }
            for index, format in enumerate(kinds)
        }
        config = {
            "quant_method": METHOD,
            "format": "mixed-precision" if len(names) > 1 else names[0],
            "quantization_status": "compressed",
            "ignore": [name for name in [*linears, *dict(routers(model))] if name not in formats],
            "config_groups": groups,
        }
        plain = kinds[0].zero_points == "none" and kinds[0].activations == "none"
        lazy = names == ["pack-quantized"] and plain and not dequantize
        return config if lazy or len(kinds) > 1 else {**config, "dequantize": True}

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """See exporter.py."""
        return {}


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """Linears as the `quantization` config of `folder` groups them."""

    folder: Path
    quantization: Mapping[str, Any]

    scale: ClassVar[str] = ".weight_scale"
    plain: ClassVar[bool] = True

    def format_of(self, name: str) -> NumberFormat | None:
        """See exporter.py."""
        try:
            for group in self.quantization["config_groups"].values():
                if name not in self.quantization["ignore"] and {"Linear", name} & set(group["targets"]):
                    return described(group)
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise foreign_config(self.folder) from error
        return None

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """See exporter.py."""
        format, (rows, columns) = self._format(name), shape
        storage, groups = storage_of(format), torch.Size([rows, ceil(columns / group_columns(format, columns))])
        own = {**storage.codes.expected(name, shape, format), **storage.scales.expected(name, groups, format, signed)}
        return own | expected_inputs(name, format)

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """See exporter.py."""
        format = self._format(name)
        storage = storage_of(format)
        try:
            scale, own, dtype = storage.scales.read(files, name, format)
            own = with_input_scale(files, name, own)
            codes, zero = storage.codes.read(files, name, shape, format)
            fits = codes.shape == shape and scale.shape == (shape[0], shape[1] // group_columns(format, shape[1]))
            fits = fits and codes.dtype == format.storage and (zero is None or zero.shape == scale.shape)
        except (KeyError, RuntimeError, ValueError, IndexError, AssertionError):
            fits = False
        if not fits:
            raise unfit(name)
        grid = Grid(scale.to(device), None if zero is None else zero.to(device, torch.float32).contiguous())
        return QuantizedWeight(codes.to(device), grid, own, dtype)

    def _format(self, name: str) -> NumberFormat:
        format = self.format_of(name)
        if format is None:
            raise unfit(name)
        return format


def layout(folder: Path, quantization: Mapping[str, Any]) -> CompressedTensorsLayout:
    """The layout that a quantization_config of config.json describes."""
    return CompressedTensorsLayout(folder, quantization)
