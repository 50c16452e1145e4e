"""An engine that loads checkpoints: the kernels that it has, and why it does not load others.

A refusal is one sentence: the limit of the engine, what was given, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.checkpoint.gguf.architectures import architecture_of
from epmq_cli.checkpoint.gguf.blocks import SUPER, check_blocks, kind_of
from epmq_cli.checkpoint.gguf.tokenizer import check_tokenizer
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family
from epmq_cli.models.conv1d import is_turned
from epmq_cli.models.mixtures import MIXTURES
from epmq_cli.models.model_folder import head_width
from epmq_cli.models.pretrained import DENSE_ONLY, from_folder
from epmq_cli.quantize.formats.format import NumberFormat, ZeroPoints
from epmq_cli.quantize.formats.names import in_groups, labels

if TYPE_CHECKING:
    import torch

DENSE = "pack=dense or pack.engine=null"
"""What to do if an engine has no kernel."""
ROWS, BY_ROW = -1, "with one scale per row"
CLIP_WIDTH = 512
"""The width of CLIP's text tower and projection if config.json does not say it."""
POINTS = {"none": "", "whole": " with zero points", "real": " with real zero points"}


@dataclass(frozen=True)
class Kernel:
    """Weights that an engine multiplies with: the name of their number format, the zero points that it may have, and
    the sizes of its groups, empty for all."""

    format: str
    points: tuple[ZeroPoints, ...] = ("none",)
    groups: tuple[int, ...] = ()

    def takes(self, format: NumberFormat) -> bool:
        """Whether the kernel multiplies with weights of this format."""
        grouped = not self.groups or format.group_size in self.groups
        return format.name == self.format and format.zero_points in self.points and grouped

    def __str__(self) -> str:
        points = " with or without zero points" if len(self.points) > 1 else " without zero points"
        sizes = [str(size) for size in self.groups if size != ROWS]
        kinds = [f"in groups of {_listed(sizes)}"] if sizes else []
        kinds += [BY_ROW] if ROWS in self.groups else []
        return " ".join([f"{self.format}{points}", " or ".join(kinds)]).strip()


@dataclass(frozen=True)
class Base:
    """What a check needs of the base: config.json, and the folder with its tokenizer; None if it is on the hub."""

    config: Mapping[str, Any]
    folder: Path | None


@dataclass(frozen=True)
class Engine:
    """An engine.

    `title`: its name for readers. `kernels`: the packed weights that it multiplies with, by the option of `pack` that
    stores them; none if it takes all. `families`: those that it loads, empty for all. `mixes`: whether linears may have
    different formats, but for the families `unmixed`. `multiple`: what inputs and outputs must be multiples of.
    `fused`: the last names of linears that it multiplies with as one. `heads`: the widths of attention heads that it
    takes, empty for all. `experts`: the packed weights that it takes in mixtures of experts. `lacks`: the model types
    that it does not know. `conv1d`: whether it takes packed weights of GPT-2. `tested`: whether `make engines` proves
    this, or we know it from the engine's sources. `command`: loads the checkpoint in a shell, see `shell_commands` in
    loading_code.py; empty if only Python does.
    """

    title: str
    kernels: Mapping[str, tuple[Kernel, ...]]
    families: tuple[str, ...] = ()
    mixes: bool = False
    unmixed: tuple[str, ...] = ()
    multiple: int = 1
    fused: tuple[tuple[str, ...], ...] = ()
    heads: tuple[int, ...] = ()
    experts: tuple[Kernel, ...] = ()
    lacks: tuple[str, ...] = ()
    conv1d: bool = True
    tested: bool = True
    command: str = ""

    @property
    def label(self) -> str:
        """The name of the engine, and how we know what it loads unless by a test."""
        return self.title if self.tested else f"{self.title} (by its sources)"

    def refusal(self, pack: str, family: Family, formats: Sequence[NumberFormat]) -> str | None:
        """Why the engine does not load checkpoints of `pack=<pack>` with these formats, and what to do; None if it
        does. `formats`: of packed weights, empty if all are dense."""
        if pack not in self.kernels:
            return f"{self.title} does not read pack={pack}; use pack={' or '.join(self.kernels)}"
        if self.families and family.name not in self.families:
            return (
                f"{self.title} does not load models of family {family.name}, only of {_listed(self.families)}; use "
                "pack.engine=null and another engine"
            )
        if len(formats) > 1 and (not self.mixes or family.name in self.unmixed):
            names = " and ".join(labels(formats))
            one = f"{self.title} needs one format in all linears of models of family {family.name}, got {names}"
            return f"{one}; use a whole number of bits without budget, {DENSE}"
        return next(filter(None, (self.format_refusal(pack, format) for format in formats)), None)

    def format_refusal(self, pack: str, format: NumberFormat) -> str | None:
        """Why the engine does not multiply with packed weights of this format; None if it does."""
        kernels = self.kernels[pack]
        if not kernels or any(kernel.takes(format) for kernel in kernels):
            return None
        same = [str(kernel) for kernel in kernels if kernel.format == format.name]
        if not same:
            names = _listed([kernel.format for kernel in kernels])
            return f"{self.title} has no kernel for {format.name}, only for {names}; use {names}, {DENSE}"
        known = f"{self.title} has kernels for {_listed(same)}, got {described(format)}"
        return f"{known}; use one of these, {DENSE}"

    def model_refusal(
        self, family: Family, linears: Mapping[str, torch.Size], formats: Sequence[NumberFormat], base: Base
    ) -> str | None:
        """Why the engine does not load a model with packed linears of these shapes (out, in); None if it does."""
        kind = base.config.get("model_type")
        if kind in self.lacks:
            return f"{self.title} has no models of type {kind}; use pack.engine=null and another engine"
        width = next((width for width in _head_widths(base.config) if self.heads and width not in self.heads), None)
        if width is not None:
            return (
                f"{self.title} takes attention heads of {_listed([str(each) for each in self.heads])} channels, got "
                f"{width}; use pack.engine=null and another engine"
            )
        if formats and kind in DENSE_ONLY:
            return f"{self.title} takes models of type {kind} with dense weights only; use {DENSE}"
        if formats and is_turned(base.config) and not self.conv1d:
            return (
                f"{self.title} loads models of type {kind} with dense weights only, because their linears are of "
                "the class Conv1D; use pack=dense, or another engine, such as pack.engine=vllm"
            )
        if formats and kind in MIXTURES:
            return self._experts_refusal(formats)
        block = max((format.row_block for format in formats), default=1)
        for name, outputs, inputs in self._products(linears) if formats else ():
            if sum(outputs) % self.multiple or inputs % self.multiple:
                return (
                    f"{self.title} multiplies with packed weights whose inputs and outputs are multiples of "
                    f"{self.multiple}, got {name} with {inputs} inputs and {sum(outputs)} outputs; use {DENSE}"
                )
            if any(size % block for size in outputs[:-1]):
                return (
                    f"{self.title} multiplies with {name} as one matrix, whose parts must have multiples of {block} "
                    f"outputs if {block} rows share a scale, got {', '.join(map(str, outputs))}; use {DENSE}"
                )
        return None

    def _experts_refusal(self, formats: Sequence[NumberFormat]) -> str | None:
        """Why the engine does not load a mixture of experts with packed weights of these formats; None if it does."""
        if len(formats) == 1 and any(kernel.takes(formats[0]) for kernel in self.experts):
            return None
        given = " and ".join(map(described, formats))
        if not self.experts:
            return f"{self.title} takes mixtures of experts with dense weights only, got {given}; use {DENSE}"
        names = _listed([str(kernel).replace(" without zero points", "") for kernel in self.experts])
        known = f"{self.title} takes mixtures of experts with one format without zero points, {names}, got {given}"
        return f"{known}; use one of these, {DENSE}"

    def _products(self, linears: Mapping[str, torch.Size]) -> Iterator[tuple[str, list[int], int]]:
        """The name, the outputs of each part and the inputs of each product of matrices; fused linears are one."""
        products: dict[str, tuple[list[int], int]] = {}
        for name, (outputs, inputs) in linears.items():
            parent, _, last = name.rpartition(".")
            whole = next((f"{parent}.{' + '.join(parts)}" for parts in self.fused if last in parts), name)
            products.setdefault(whole, ([], inputs))[0].append(outputs)
        return ((name, outputs, inputs) for name, (outputs, inputs) in products.items())


@dataclass(frozen=True)
class Vllm(Engine):
    """vLLM, which puts the features of CLIP's pictures, as wide as the projection, where the prompt has token 0
    (vllm/model_executor/models/clip.py)."""

    def model_refusal(
        self, family: Family, linears: Mapping[str, torch.Size], formats: Sequence[NumberFormat], base: Base
    ) -> str | None:
        """See Engine."""
        reason = super().model_refusal(family, linears, formats, base)
        return self._clip_refusal(base) if reason is None and base.config.get("model_type") == "clip" else reason

    def _clip_refusal(self, base: Base) -> str | None:
        """Why vLLM does not load a CLIP model; None if it does."""
        width = (base.config.get("text_config") or {}).get("hidden_size", CLIP_WIDTH)
        projection = base.config.get("projection_dim", CLIP_WIDTH)
        if width > projection:
            return (
                f"{self.title} takes CLIP models whose text tower is not wider than the projection, got {width} and "
                f"{projection} channels; use pack.engine=null and another engine"
            )
        if base.folder is not None and 0 in _special_tokens(base.folder):
            return (
                f"{self.title} takes CLIP models whose token 0 is not special, because pictures take its place, got "
                f"one that is in {base.folder}; use pack.engine=null and another engine"
            )
        return None


@dataclass(frozen=True)
class LlamaCpp(Engine):
    """llama.cpp reads what `epmq export` writes, so the checks are those of the export."""

    def format_refusal(self, pack: str, format: NumberFormat) -> str | None:
        """See Engine."""
        return _refused(lambda: kind_of(format)) or _refused(lambda: check_blocks("every linear", SUPER, format))

    def model_refusal(
        self, family: Family, linears: Mapping[str, torch.Size], formats: Sequence[NumberFormat], base: Base
    ) -> str | None:
        """See Engine. Also why llama.cpp has no such model or tokenizer."""
        for format, (name, shape) in product(formats, linears.items()):
            if (reason := _refused(partial(check_blocks, name, shape[1], format))) is not None:
                return reason
        reason, folder = _refused(lambda: architecture_of(base.config)), base.folder
        if reason is None and folder is not None:
            reason = _refused(lambda: check_tokenizer(folder))
        return reason


def described(format: NumberFormat) -> str:
    """A number format in words, such as int4 with zero points in groups of 64."""
    return f"{format.name}{POINTS[format.zero_points]} {in_groups(format)}"


def _head_widths(config: Mapping[str, Any]) -> Iterator[int]:
    """The widths of attention heads, as far as config.json says them; those of all towers if there are several."""
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        if {"hidden_size", "num_attention_heads"} <= part.keys():
            yield head_width(part)


def _special_tokens(folder: Path) -> Collection[int]:
    """The numbers of a tokenizer's special tokens."""
    from transformers import AutoTokenizer

    found: list[int] = from_folder(AutoTokenizer, folder).all_special_ids
    return found


def _refused(check: Callable[[], object]) -> str | None:
    """The message of a check's ConfigError; None if there is none."""
    try:
        check()
    except ConfigError as error:
        return str(error)
    return None


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
