"""What a model consists of, for the walk: steps, sections, stacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from epmq_cli.data.batching import Batch

Mask = Callable[[Batch], Tensor | None]
"""(samples, tokens) bool of a batch, True for the tokens that are real; None where all are."""


@dataclass(frozen=True)
class Linears:
    """Linears that read the same input.

    `stream`: the module whose input is the residual stream that their outputs are added to, if they are. `mixing`:
    those whose outputs reach the other tokens, as keys and values do. `memory`: whether they read the output of
    another stack, as keys and values of cross-attention do. `scale`: what their outputs are multiplied with before they
    are added to the stream. `producer`: the norm or linear whose output channels are their input channels, each times a
    factor that does not depend on it, and go nowhere else; None where there is none.
    """

    names: tuple[str, ...]
    stream: str | None = None
    mixing: tuple[str, ...] = ()
    memory: bool = False
    scale: float = 1.0
    producer: str | None = None


@dataclass(frozen=True)
class Norm:
    """A norm, which is solved where it has a gain. `mixing`: whether its output reaches the other tokens."""

    name: str
    mixing: bool = False


@dataclass(frozen=True)
class Patches:
    """A convolution whose kernel is its stride and that has no bias, the table of positions that is added to what it
    gives, and the class token that comes first, if there is one."""

    convolution: str
    positions: str
    class_token: str | None


@dataclass(frozen=True)
class Table:
    """A table of embeddings, and the module that looks it up where that is another one of the same weight."""

    name: str
    reader: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the model that is walked through in one go: its steps in the order of the forward pass.

    Names in `steps` are the module's own; with `prefix` before them they are the model's.
    """

    prefix: str
    module: nn.Module
    steps: tuple[Linears | Norm, ...]

    @property
    def linears(self) -> list[str]:
        """The module's own names of its linears, in the order of the steps."""
        return [name for step in self.steps if isinstance(step, Linears) for name in step.names]

    @property
    def modules(self) -> list[str]:
        """The module's own names of all that its steps name, its norms included."""
        return [name for step in self.steps for name in (step.names if isinstance(step, Linears) else (step.name,))]

    def name(self, local: str) -> str:
        """The name in the model of a module or tensor of this section."""
        return f"{self.prefix}.{local}" if self.prefix else local


def all_real(batch: Batch) -> Tensor | None:
    """The mask of inputs without padding."""
    return None


@dataclass(frozen=True)
class Stack:
    """Blocks that one stream runs through, what makes that stream, and what is behind them.

    `readout`: a module of its own that shares its tensors with the model and makes of the last block's output (samples,
    tokens, width) what the heads, or the next stack, read. `stem`: what the first stream is the sum of. `first_norm`:
    the norm that it goes through before the first block. `read_token`: the one token that is read out behind the last
    block; None where all are. `mask` of the stream, `memory` of what cross-attention reads. `handed`: the key of a
    batch under which what the readout makes of it goes to the next stack.
    """

    blocks: list[Section]
    readout: Section
    stem: tuple[Patches | Table, ...] = ()
    first_norm: str | None = None
    read_token: int | None = None
    mask: Mask = all_real
    memory: Mask = all_real
    handed: str | None = None

    @property
    def sections(self) -> list[Section]:
        """The blocks and what is behind them."""
        return [*self.blocks, self.readout]
