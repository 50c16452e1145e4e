"""The parts of a model that calibration goes through: stacks of blocks, and the steps of a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from epmq_cli.data.batching import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

Mask = Callable[[Batch], "Tensor | None"]
"""(samples, tokens) bool of a batch, True for real tokens; None if all are."""

MEAN: Literal["mean"] = "mean"
Pooling = Literal["mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""How all tokens become one, in the words of sentence-transformers: their mean, largest values, sum over the root of
their number, mean weighted by their place, or the last one."""


@dataclass(frozen=True)
class FirstAndMean:
    """The first token beside the mean of the tokens from this place on: twice the width."""

    start: int


ReadToken = int | Pooling | FirstAndMean | None
"""The tokens that heads read behind the last block: the one at this position, all pooled to one, or all (None)."""


@dataclass(frozen=True)
class Route:
    """The tokens that reach an expert of a mixture: those that a router, a module of the block, sends to the expert of
    this number."""

    router: str
    expert: int


@dataclass(frozen=True)
class Linears:
    """Linears that read the same input."""

    names: tuple[str, ...]

    stream: str | None = None
    """The module whose input is the residual stream that the outputs are added to, if they are."""

    mixing: tuple[str, ...] = ()
    """The linears whose outputs reach other tokens, such as keys and values."""

    memory: bool = False
    """Whether the input is the output of another stack, as for keys and values of cross-attention."""

    scale: float = 1.0
    """The factor of the outputs before they are added to the stream."""

    parallel: bool = False
    """Whether another part of the block reads the stream before the outputs are added to it."""

    producer: str | None = None
    """The norm or linear whose output channels are the input channels, each times a factor independent of it, and are
    used nowhere else; None if there is none."""

    route: Route | None = None
    """The tokens that they read; None for all. The outputs of all experts of a router together are added to the stream,
    each times a factor; the factors of a token add up to 1 if there is a stream."""


@dataclass(frozen=True)
class Norm:
    """A norm, which is solved where it has a gain."""

    name: str

    mixing: bool = False
    """Whether its output reaches other tokens."""


@dataclass(frozen=True)
class Patches:
    """A convolution without bias whose stride is its kernel, the table of positions that is added to its output, and
    the class token that comes first, if there is one."""

    convolution: str
    positions: str
    class_token: str | None


@dataclass(frozen=True)
class Table:
    """A table of embeddings, and the module that looks it up where that is another one with the same weight.

    `numbered`: whether the module makes the numbers of the rows itself, as for positions; otherwise its input has them.
    """

    name: str
    reader: str | None = None
    numbered: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the model that is calibrated in one pass, with its steps in the order of the forward pass.

    Names in `steps` and `routers`, which send tokens to experts, are the module's own; with `prefix` in front they are
    the model's.
    """

    prefix: str
    module: nn.Module
    steps: tuple[Linears | Norm, ...]
    routers: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """The module's own names of its linears, in the order of the steps."""
        return [name for step in self.steps if isinstance(step, Linears) for name in step.names]

    @property
    def modules(self) -> list[str]:
        """The module's own names of its linears and norms, in the order of the steps."""
        return [name for step in self.steps for name in (step.names if isinstance(step, Linears) else (step.name,))]

    def name(self, local: str) -> str:
        """The model's name of a module or tensor of this section."""
        return f"{self.prefix}.{local}" if self.prefix else local


def token_mask(batch: Batch) -> Tensor | None:
    """(samples, tokens) bool, True for real tokens; None for inputs without padding, such as images."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def all_real(batch: Batch) -> Tensor | None:
    """The mask of inputs without padding."""
    return None


@dataclass(frozen=True)
class Stack:
    """Blocks with one residual stream, the modules that make that stream, and the readout behind them."""

    blocks: list[Section]

    readout: Section
    """A separate module that shares its tensors with the model. It turns the last block's output (samples, tokens,
    width) into what the heads, or the next stack, read; pooling over tokens comes after it."""

    stem: tuple[Patches | Table, ...] = ()
    """The modules whose outputs are summed to the first stream."""

    first_norm: str | None = None
    """The norm between the stem and the first block."""

    read_token: ReadToken = None

    mask: Mask = all_real
    """The real tokens of the stream."""

    memory: Mask = all_real
    """The real tokens that cross-attention reads."""

    handed: str | None = None
    """The key under which the next stack finds the readout's output in a batch."""

    bypassed: tuple[str, ...] = ()
    """Modules between the blocks that a forward pass leaves out for the inputs of tasks. They stay as merged, dense."""

    @property
    def sections(self) -> list[Section]:
        """The blocks and the readout."""
        return [*self.blocks, self.readout]

    @property
    def lone_token(self) -> int | None:
        """The only token that heads read; None if all count alike."""
        return self.read_token if isinstance(self.read_token, int) else None

    @property
    def pools(self) -> bool:
        """Whether pooling over tokens comes after the readout."""
        return self.read_token is not None and self.lone_token is None


def pooled(hidden: Tensor, token: ReadToken, mask: Tensor | None) -> Tensor:
    """The part of hidden states (samples, tokens, width) that heads read: (samples, width), or all of it if they
    read all tokens. `FirstAndMean` is for inputs without padding. `mask` (samples, tokens): the real tokens, which come
    first; None if all are."""
    if token is None:
        return hidden
    if isinstance(token, int):
        return hidden[:, token]
    if isinstance(token, FirstAndMean):
        return torch.cat([hidden[:, 0], hidden[:, token.start :].mean(1)], -1)
    if token == MEAN and mask is None:
        return hidden.mean(1)
    real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    if token == "max":
        return hidden.masked_fill(real[..., None] == 0, -math.inf).amax(1)
    if token == "lasttoken":
        return hidden[torch.arange(len(hidden)), real.sum(1).long() - 1]
    if token == "weightedmean":
        real = real * torch.arange(1, 1 + real.shape[1], device=real.device)
    total, count = (hidden * real[..., None]).sum(1), real.sum(1, keepdim=True)
    return total / (count.sqrt() if token == "mean_sqrt_len_tokens" else count)
