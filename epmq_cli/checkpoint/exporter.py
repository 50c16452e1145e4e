"""The interface of a checkpoint format: an `Exporter` writes it (`pack=<name>`), a `Layout` reads it.

They are two objects, because a checkpoint is read without the options of the run that wrote it: a layout reads only the
folder's config.json (layouts.py). Code outside this folder uses these two and never the name of a format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from epmq_cli.errors import CheckpointError, ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.model_folder import Tensors
from epmq_cli.quantize.formats.format import NumberFormat, QuantizedWeight
from epmq_cli.store.safetensors_writer import Entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Exporter(Protocol):
    """Stores the quantized weights of `epmq run`. Everything else in a checkpoint is the same for all exporters."""

    packs: ClassVar[bool]
    """Whether weights stay packed in the checkpoint, so that a kernel can multiply with them."""

    tags: ClassVar[tuple[str, ...]]
    """Tags of the model card."""

    requires: ClassVar[tuple[str, ...]]
    """Packages that transformers needs to load the checkpoint, beside those that epmq itself needs."""

    cache_config: ClassVar[Mapping[str, Any]]
    """The entries of `config` that tell engines of the scales of cached keys and values; empty if it stores none."""

    @property
    def dtype(self) -> str:
        """The type of scales and of unquantized tensors; `auto`: the type of most of the base's elements."""

    @property
    def shard_size(self) -> object:
        """The largest size of a file, such as 5GB."""

    @property
    def engine(self) -> str | None:
        """The engine that must load the checkpoint (engines.py); None if any may."""

    @property
    def open_clip(self) -> bool:
        """Whether CLIP models are written for open_clip as well (open_clip.py)."""

    @property
    def gguf(self) -> str | None:
        """How matrices that are not quantized are stored in model.gguf, which is written into the checkpoint as well
        (gguf/write.py); None for other formats."""

    def check(self, family: Family, formats: Collection[NumberFormat]) -> None:
        """ConfigError if the exporter cannot store these formats, or if loaders do not support the family; called
        before any model is opened. `formats`: the possible formats of a linear, empty for `quant=none`."""

    def check_linears(
        self, linears: Mapping[str, torch.Size], model: nn.Module, formats: Collection[NumberFormat]
    ) -> None:
        """ConfigError if the linears of a model cannot be stored; called before anything is calibrated. `linears`:
        the shape (out, in) of each weight that will be quantized, by module name."""

    def entries(self, name: str, weight: QuantizedWeight) -> list[Entry]:
        """The tensors that store the weight of a linear, each computed when it is written."""

    def config(self, model: nn.Module, weights: Mapping[str, QuantizedWeight], dequantize: bool) -> dict[str, Any]:
        """The `quantization_config` of config.json; empty if readers need none. `dequantize`: whether transformers must
        dequantize while it loads, rather than when the model is first called."""

    def files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Further text files that loaders read, by name; `config`: the result of the method `config`."""


class Layout(Protocol):
    """Reads the linears of a checkpoint as its config.json describes them."""

    scale: ClassVar[str]
    """The suffix of the tensor with the scales, which every quantized linear has; empty if none is quantized."""

    plain: ClassVar[bool]
    """Whether transformers loads the checkpoint with the packages that epmq itself needs."""

    def format_of(self, name: str) -> NumberFormat | None:
        """The number format of a linear; None if it is dense. CheckpointError if epmq did not write the config."""

    def expected(self, name: str, shape: torch.Size, signed: bool) -> dict[str, ExpectedTensor]:
        """The tensors that store a quantized weight of this shape; `signed`: whether scales may be negative."""

    def read(self, files: Tensors, name: str, shape: torch.Size, device: torch.device) -> QuantizedWeight:
        """The quantized weight (out, in) of a linear; CheckpointError if its tensors do not fit config.json."""


def finite(tensor: Tensor) -> str | None:
    """The problem with the values of a tensor of any kind; None if it has none."""
    if not tensor.is_floating_point():
        return None
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # torch has no isfinite for FP8
    return None if values.isfinite().all() else "holds NaN or infinity"


def signed_scale(tensor: Tensor) -> str | None:
    """The problem with scales of either sign."""
    return finite(tensor) or (None if (tensor != 0).all() else "holds scales of 0")


def positive_scale(tensor: Tensor) -> str | None:
    """The problem with scales that must be positive."""
    return finite(tensor) or (None if (tensor.float() > 0).all() else "holds scales that are not above 0")


def scale_check(format: NumberFormat, signed: bool) -> Callable[[Tensor], str | None]:
    """The check of the scales of a format; negative ones are useful only if codes are not mirrored."""
    return signed_scale if signed and not format.mirrored else positive_scale


def check_plain_inputs(pack: str, formats: Collection[NumberFormat]) -> None:
    """ConfigError if a format rounds the inputs of linears, which `pack` cannot tell engines."""
    for format in formats:
        if format.activations != "none":
            raise ConfigError(
                f"pack={pack} stores no format of activations, got quant.format={format.name}; use "
                "pack=compressed_tensors, or quant.format=int or fp8"
            )


def equal_to(values: list[int], tensor: Tensor) -> str | None:
    """The problem with a short tensor that must have these values."""
    return None if tensor.tolist() == values else f"is {tensor.tolist()}, config.json implies {values}"


@dataclass(frozen=True)
class ExpectedTensor:
    """The shape of a stored tensor, the safetensors name of its type (None for any), and a check of its values."""

    shape: tuple[int, ...]
    dtype: str | None = None
    check: Callable[[Tensor], str | None] = finite


def words(count: int, bits: int) -> int:
    """The number of int32 that hold this many integers of `bits` bits without a gap."""
    return -(-count * bits // 32)


def foreign_config(folder: Path) -> CheckpointError:
    """The error for a quantization_config that epmq did not write."""
    return CheckpointError(
        f"{folder / 'config.json'} has a quantization_config that epmq does not write; give the checkpoint folder that "
        "epmq run wrote"
    )


def unfit(name: str) -> CheckpointError:
    """The error for a linear whose tensors do not fit config.json."""
    return CheckpointError(f"the tensors of {name} are not those that config.json describes; see epmq verify")
