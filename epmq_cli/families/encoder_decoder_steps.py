"""The steps of the blocks of encoder-decoders, by the names of their modules.

A block is attention, cross-attention in decoders, and a feed-forward. Each has one norm, all in front of their parts or
all behind the addition to the residual stream. Names are not proof: before a run calibrates a block, `self_check`
compares the steps with the block's own output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from epmq_cli.errors import ModelError
from epmq_cli.families.refusal import unknown_tensor
from epmq_cli.families.structure import Linears, Norm

if TYPE_CHECKING:
    from torch import nn

Step = Linears | Norm
Kind = Literal["attention", "cross-attention", "feed-forward"]


@dataclass(frozen=True)
class Part:
    """A part of a block: the linears that read its input (of attention queries, keys and values, in this order), the
    one that writes its output, and its norm."""

    kind: Kind
    reading: tuple[str, ...]
    writing: str
    norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears."""
        return (*self.reading, self.writing)

    def steps(self, behind: bool) -> Iterator[Step]:
        """The steps; `behind`: whether the norm comes behind the addition to the residual stream."""
        before, (first, *others) = None if behind else self.norm, self.reading
        if not behind:
            yield Norm(self.norm, mixing=self.kind == "attention")
        if self.kind == "cross-attention":
            yield Linears((first,), producer=before)
            yield Linears(tuple(others), memory=True)
        else:
            yield Linears(self.reading, mixing=tuple(others) if self.kind == "attention" else (), producer=before)
        last = others[-1] if others else None  # the values, or what the first linear gates
        yield Linears((self.writing,), stream=before or first, producer=last)
        if behind:
            yield Norm(self.norm)


def _attention(kind: Kind, module: str, linears: tuple[str, str, str, str], norm: str) -> Part:
    *reading, writing = (f"{module}.{name}" for name in linears)
    return Part(kind, tuple(reading), writing, norm)


T5_LINEARS, BART_LINEARS = ("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "out_proj")
PARTS = (
    _attention("attention", "layer.0.SelfAttention", T5_LINEARS, "layer.0.layer_norm"),
    _attention("cross-attention", "layer.1.EncDecAttention", T5_LINEARS, "layer.1.layer_norm"),
    *(
        Part("feed-forward", tuple(f"{ff}.{name}" for name in names), f"{ff}.wo", f"layer.{number}.layer_norm")
        for number in (1, 2)  # of encoders, of decoders
        for ff in (f"layer.{number}.DenseReluDense",)
        for names in (("wi",), ("wi_0", "wi_1"))
    ),
    _attention("attention", "self_attn", BART_LINEARS, "self_attn_layer_norm"),
    _attention("cross-attention", "encoder_attn", BART_LINEARS, "encoder_attn_layer_norm"),
    Part("feed-forward", ("fc1",), "fc2", "final_layer_norm"),
)
"""A block consists of the parts whose modules it has."""
UNSOLVED = (r"layer\.0\.SelfAttention\.relative_attention_bias\.weight",)
"""Patterns of the tensors of a block that no step solves: position biases of T5, which stay as merged."""


def block_steps(block: nn.Module, behind: bool, where: str) -> tuple[Step, ...]:
    """The steps of a block in the order of its forward pass; ModelError where a part is not known.

    `behind`: whether norms come behind their parts. `where`: the name of the block in errors.
    """
    names = {name for name, _ in block.named_modules()}
    linears = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = [part for part in PARTS if linears.issuperset(part.linears) and part.norm in names]
    for kind in ("attention", "feed-forward"):
        if kind not in {part.kind for part in parts}:
            children = ", ".join(name for name, _ in block.named_children()) or "nothing"
            raise ModelError(f"{where} (which has {children}) has no {kind} that the family knows")
    steps = tuple(step for part in parts for step in part.steps(behind))
    modules = {name for part in parts for name in (*part.linears, part.norm)}
    if (name := unknown_tensor(block.state_dict(), modules, UNSOLVED)) is not None:
        raise ModelError(f"{where} has {name}, which no step of the family knows")
    return steps
