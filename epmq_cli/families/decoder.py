"""The steps of the blocks of decoders, by the names of their modules.

A block is attention followed by a feed-forward, each with a norm before it, behind it, or both; or attention and a
feed-forward in parallel, which read the same stream. The names select one of the layouts below. Names are not proof:
before a run calibrates a block, `self_check` compares the steps with the block's own output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epmq_cli.errors import ModelError
from epmq_cli.families.refusal import unknown_tensor
from epmq_cli.families.structure import Linears, Norm, Route
from epmq_cli.models.mixtures import router_of

if TYPE_CHECKING:
    from torch import nn


Step = Linears | Norm


@dataclass(frozen=True)
class Layout:
    """The norms of a block around attention and the feed-forward; None for a missing norm.

    A norm behind a part normalizes what the part adds to the residual stream. `parallel`: whether both parts read the
    block's input. `first`: whether both norms come in front of both parts.
    """

    before_attention: str | None
    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None
    parallel: bool = False
    first: bool = False

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
    Layout("self_attn_layer_norm", None, "final_layer_norm", None),  # XGLM
    Layout("ln_1", None, "ln_2", None),  # GPT-2, GPT-Neo
    Layout("norm_1", None, "norm_2", None),  # MPT
    Layout("input_layernorm", None, None, None, parallel=True),  # Cohere, Phi 2, Falcon 7B
    Layout("ln_1", None, None, None, parallel=True),  # GPT-J
    Layout("ln_attn", None, "ln_mlp", None, parallel=True, first=True),  # Falcon 40B
    Layout("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # GLM 4
)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    (QKV, "self_attn.o_proj"),
    (QKV, "self_attn.dense"),  # Phi 2
    (QKV, "self_attn.out_proj"),  # XGLM
    (("self_attn.qkv_proj",), "self_attn.o_proj"),  # Phi 3
    (("self_attn.query_key_value",), "self_attn.dense"),  # Persimmon
    (("self_attention.query_key_value",), "self_attention.dense"),  # Falcon, BLOOM
    (("attention.query_key_value",), "attention.dense"),  # GPT-NeoX
    (("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.out_proj"),  # GPT-J
    (("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"), "attn.attention.out_proj"),  # GPT-Neo
    (("attn.c_attn",), "attn.c_proj"),  # GPT-2, GPT-BigCode
    (("attn.qkv_proj",), "attn.out_proj"),  # CodeGen
    (("attn.Wqkv",), "attn.out_proj"),  # MPT
)
FEED_FORWARD = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),  # Phi 3, GLM
    (("mlp.up_proj",), "mlp.down_proj"),  # Arcee, Nemotron
    (("mlp.c_fc",), "mlp.c_proj"),  # GPT-2, GPT-Neo, StarCoder 2
    (("mlp.fc1",), "mlp.fc2"),  # Phi 2
    (("fc1",), "fc2"),  # XGLM
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    (("mlp.fc_in",), "mlp.fc_out"),  # GPT-J
    (("ffn.up_proj",), "ffn.down_proj"),  # MPT
    (("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj"),  # Llama 4
)
SHARED = (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), "mlp.shared_expert.down_proj")
"""The expert of Qwen 2 MoE that reads all tokens."""
LAST = "feed_forward.shared_expert"
ALSO = ((f"{LAST}.gate_proj", f"{LAST}.up_proj"), f"{LAST}.down_proj")
"""That of Llama 4, which comes after the others and writes into the stream as it is."""
LINEAR = (QKV, FEED_FORWARD[0][0])
"""Groups whose last linear, v_proj or up_proj, is the producer of the linear that follows, channel by channel."""
UNSOLVED = (
    r"self_attn\.([qk]_norm|query_layernorm|key_layernorm)\.(weight|bias)",
    r"self_attn\.[qk]_layernorm\.(norms\.\d+\.)?(weight|bias)",  # StableLM, Persimmon
    r"mlp\.act_fn\.\w+",  # activations with parameters, such as those of Apertus
    r"((mlp|block_sparse_moe)\.(gate|shared_expert_gate)|feed_forward\.router)\.weight",  # routers
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
    experts = tuple(_experts(block))
    if layout is None or attention is None or not (mlp or experts):
        lacks = "norms" if attention and mlp else "attention" if attention is None else "feed-forward"
        children = ", ".join(name for name, _ in block.named_children()) or "nothing"
        raise ModelError(f"{where} (which has {children}) has no {lacks} that the family knows")
    scale = float(getattr(block, "residual_multiplier", 1.0))  # Granite
    if scale == 0:
        raise ModelError(f"{where} has a residual_multiplier of 0")
    if mlp is None:
        steps = (
            *_part(attention, layout.before_attention, layout.behind_attention, scale),
            *_mixture(block, experts, layout.before_mlp),
        )
    elif layout.parallel or getattr(block, "use_parallel_residual", False):  # GPT-NeoX
        steps = tuple(_parallel(attention, mlp, layout))
    else:
        steps = (
            *_part(attention, layout.before_attention, layout.behind_attention, scale),
            *_part(mlp, layout.before_mlp, layout.behind_mlp, scale),
        )
    modules = [name for step in steps for name in (step.names if isinstance(step, Linears) else (step.name,))]
    if (name := unknown_tensor(block.state_dict(), modules, UNSOLVED)) is not None:
        raise ModelError(f"{where} has {name}, which no step of the family knows")
    return steps


def routers_of(steps: Sequence[Step]) -> tuple[str, ...]:
    """The routers of the experts among these steps."""
    routes = (step.route for step in steps if isinstance(step, Linears) and step.route is not None)
    return tuple(dict.fromkeys(route.router for route in routes))


Part = tuple[tuple[str, ...], str]
"""The linears of attention or of a feed-forward: those that read its input, and the one that writes its output."""


def _parallel(attention: Part, mlp: Part, layout: Layout) -> Iterator[Step]:
    """The steps of a block whose parts read the same stream. Attention alone corrects the stream's drift."""
    norms = [Norm(name) for name in layout.norms]
    own = len(norms) > 1  # each part has its own norm
    yield norms[0]
    if layout.first:
        yield norms[1]
    yield Linears(attention[0], producer=norms[0].name if own else None)
    yield Linears(
        (attention[1],),
        stream=norms[0].name,
        producer=attention[0][-1] if attention[0] in LINEAR else None,
        parallel=True,
    )
    if own and not layout.first:
        yield norms[1]
    yield Linears(mlp[0], producer=norms[1].name if own else None)
    yield Linears((mlp[1],), producer=mlp[0][-1] if mlp[0] in LINEAR else None)


def _part(linears: Part, before: str | None, behind: str | None, scale: float) -> Iterator[Step]:
    """The steps of attention or of a feed-forward. Linears with a norm behind them write into no stream."""
    reading, writing = linears
    stream = None if behind else before or reading[0]
    if before:
        yield Norm(before)
    yield Linears(reading, producer=before)
    yield Linears((writing,), stream=stream, scale=scale, producer=reading[-1] if reading in LINEAR else None)
    if behind:
        yield Norm(behind)


def _experts(block: nn.Module) -> Iterator[tuple[Part, Route]]:
    """The linears of each routed expert of a block, and the tokens that reach it."""
    from epmq_cli.models.routed_experts import RoutedExperts  # a module: imports torch

    for name, module in block.named_modules():
        if isinstance(module, RoutedExperts):
            for number in range(len(module)):
                gate, up, down = (f"{name}.{number}.{part}" for part in module.linears)
                yield ((gate, up), down), Route(router_of(name, module.router), number)


def _mixture(block: nn.Module, experts: Sequence[tuple[Part, Route]], norm: str | None) -> Iterator[Step]:
    """The steps of a mixture of experts. A shared expert comes first, or last, it reads all tokens.

    The last one corrects the stream's drift; else the routed experts do if the factors of a token add up to 1.
    Otherwise attention alone does.
    """
    names = {name for name, _ in block.named_modules()}
    if norm is not None:
        yield Norm(norm)
    if SHARED[1] in names:
        yield Linears(SHARED[0])
        yield Linears((SHARED[1],), producer=SHARED[0][-1])
    for (reading, writing), route in experts:
        whole = LAST not in names and getattr(block.get_submodule(route.router), "norm_topk_prob", True)
        yield Linears(reading, route=route)
        yield Linears((writing,), stream=norm if whole else None, producer=reading[-1], route=route)
    if LAST in names:
        yield Linears(ALSO[0])
        yield Linears((ALSO[1],), stream=norm, producer=ALSO[0][-1], parallel=True)
