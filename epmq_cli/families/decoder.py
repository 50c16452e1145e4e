"""The steps of the blocks of decoders, by the names of their modules.

A block is attention followed by a feed-forward, each with a norm before it, behind it, or both. The names select one of
the layouts below. Names are not proof: before a run calibrates a block, `self_check` compares the steps with the
block's own output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.families.refusal import unknown_tensor
from epmq_cli.families.structure import Linears, Norm

if TYPE_CHECKING:
    from torch import nn


Step = Linears | Norm


@dataclass(frozen=True)
class Layout:
    """The norms of a block around attention and the feed-forward; None for a missing norm.

    A norm behind a part normalizes what the part adds to the residual stream.
    """

    before_attention: str | None
    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None

    @property
    def norms(self) -> list[str]:
        """The names of the norms."""
        names = (self.before_attention, self.behind_attention, self.before_mlp, self.behind_mlp)
        return [name for name in names if name is not None]


LAYOUTS = (
    Layout("input_layernorm", None, "post_attention_layernorm", None),  # Llama
    Layout("attention_layernorm", None, "feedforward_layernorm", None),  # Apertus
    Layout("input_layernorm", None, "pre_feedforward_layernorm", None),  # VaultGemma
    Layout(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
    Layout(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),  # Gemma 2
    Layout("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # GLM 4
)
ATTENTION = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    (("self_attn.qkv_proj",), "self_attn.o_proj"),  # Phi 3
)
FEED_FORWARD = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),  # Phi 3, GLM
    (("mlp.up_proj",), "mlp.down_proj"),  # Arcee, Nemotron
    (("mlp.c_fc",), "mlp.c_proj"),  # StarCoder 2
)
LINEAR = (ATTENTION[0][0], FEED_FORWARD[0][0])
"""Groups whose last linear, v_proj or up_proj, is the producer of the linear that follows, channel by channel."""
UNSOLVED = (
    r"self_attn\.([qk]_norm|query_layernorm|key_layernorm)\.(weight|bias)",
    r"self_attn\.[qk]_layernorm\.norms\.\d+\.(weight|bias)",  # StableLM
    r"mlp\.act_fn\.\w+",  # activations with parameters, such as those of Apertus
)
"""Patterns of the tensors of a block that no step solves. They act between two steps and stay as merged."""


def block_steps(block: nn.Module, where: str) -> tuple[Step, ...]:
    """The steps of a block in the order of its forward pass; ModelError where its layout is not known.

    `where`: the name of the block in errors.
    """
    names = {name for name, _ in block.named_modules()}
    linears = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    fitting = [layout for layout in LAYOUTS if names.issuperset(layout.norms)]
    layout = max(fitting, key=lambda layout: len(layout.norms), default=None)
    attention = next((part for part in ATTENTION if linears.issuperset((*part[0], part[1]))), None)
    mlp = next((part for part in FEED_FORWARD if linears.issuperset((*part[0], part[1]))), None)
    if layout is None or attention is None or mlp is None:
        lacks = "norms" if attention and mlp else "attention" if attention is None else "feed-forward"
        children = ", ".join(name for name, _ in block.named_children()) or "nothing"
        raise ModelError(f"{where} (which has {children}) has no {lacks} that the family knows")
    scale = float(getattr(block, "residual_multiplier", 1.0))  # Granite
    if scale == 0:
        raise ModelError(f"{where} has a residual_multiplier of 0")
    steps = (
        *_part(attention, layout.before_attention, layout.behind_attention, scale),
        *_part(mlp, layout.before_mlp, layout.behind_mlp, scale),
    )
    modules = [name for step in steps for name in (step.names if isinstance(step, Linears) else (step.name,))]
    if (name := unknown_tensor(block.state_dict(), modules, UNSOLVED)) is not None:
        raise ModelError(f"{where} has {name}, which no step of the family knows")
    return steps


def _part(linears: tuple[tuple[str, ...], str], before: str | None, behind: str | None, scale: float) -> Iterator[Step]:
    """The steps of attention or of a feed-forward. Linears with a norm behind them write into no stream."""
    reading, writing = linears
    stream = None if behind else before or reading[0]
    if before:
        yield Norm(before)
    yield Linears(reading, producer=before)
    yield Linears((writing,), stream=stream, scale=scale, producer=reading[-1] if reading in LINEAR else None)
    if behind:
        yield Norm(behind)
