"""Mixtures of experts with one linear for each matrix of an expert.

transformers 5 keeps the experts of a block in two parameters of three dimensions. Files have one tensor for each
expert, which is a linear with its own inputs to whatever calibrates, packs or loads it. `unpacked` gives a model the
files' modules and names, and the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from epmq_cli.models.mixtures import EXPERTS, LLAMA4, MIXTURES, SHARED_FACTOR, Names, router_of


class Expert(nn.Module):
    """A gated feed-forward; `gate_up` (2 inner, width), `down` (width, inner)."""

    def __init__(self, names: Names, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.names, self.act_fn = names, act_fn
        inner = gate_up.shape[0] // 2
        for name, weight in ((names.gate, gate_up[:inner]), (names.up, gate_up[inner:]), (names.down, down)):
            self.add_module(name, _linear(weight))

    def forward(self, rows: Tensor) -> Tensor:
        """The outputs (tokens, width) for rows (tokens, width)."""
        gate, up, down = map(self.get_submodule, (self.names.gate, self.names.up, self.names.down))
        outputs: Tensor = down(self.act_fn(gate(rows)) * up(rows))
        return outputs


class RoutedExperts(nn.ModuleList):
    """The experts of a block, in place of the module of transformers. `linears`: the names of gate, up and down in an
    expert. `router`: that of the router beside the experts. `scales_inputs`: whether factors scale what experts read,
    not what they write."""

    def __init__(self, names: Names, experts: Iterable[Expert]) -> None:
        super().__init__(experts)
        self.linears = (names.gate, names.up, names.down)
        self.router, self.scales_inputs = names.router, names is LLAMA4

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum (tokens, width) of the outputs of each token's experts.

        `hidden_states` (tokens, width); `top_k_index` (tokens, k): the experts; `top_k_weights` (tokens, k): their
        factors. Experts without tokens are called if hooks wait for them.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens) or _is_watched(expert):
                rows, factors = hidden_states[tokens], top_k_weights[tokens, places, None]
                outputs = expert(rows * factors) if self.scales_inputs else expert(rows) * factors
                total.index_add_(0, tokens, outputs.to(total.dtype))
        return total


def _experts(names: Names, packed: Any) -> Iterator[Expert]:
    """The experts in the parameters of a module of transformers."""
    for gate_up, down in zip(packed.gate_up_proj.data, packed.down_proj.data, strict=True):
        if names is LLAMA4:
            gate_up, down = gate_up.T.contiguous(), down.T.contiguous()
        yield Expert(names, gate_up, down, packed.act_fn)


def _is_watched(expert: nn.Module) -> bool:
    """Whether a hook waits for the call of a linear."""
    return any(linear._forward_pre_hooks or linear._forward_hooks for linear in expert.children())


def unpacked(model: Any) -> Any:
    """The model itself with linears for experts, if its type is in `MIXTURES`. Their weights are views, but for those
    of Llama 4, which are turned."""
    names = MIXTURES.get(getattr(model.config, "model_type", ""))
    if names is None:
        return model
    if names is LLAMA4:
        from epmq_cli.models.llama4 import with_routing  # a module: imports the model's code

        with_routing(model)
    for module in list(model.modules()):
        block = module._modules.get(names.module)
        packed = None if block is None else block._modules.get(EXPERTS)
        if packed is not None and not isinstance(packed, RoutedExperts):
            block.experts = RoutedExperts(names, _experts(names, packed))
            if names.block != names.module:  # the parent calls it by one name, its tensors have the other
                module._modules[names.block] = module._modules.pop(names.module)
                module.__dict__[names.module] = block
    return model


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The routers of a model of unpacked experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            router = router_of(name, module.router)
            yield router, model.get_submodule(router)


def shared_factors(model: nn.Module) -> Iterator[nn.Module]:
    """The linears with one output whose sigmoid is the factor of a shared expert."""
    for name, _ in routers(model):
        block = model.get_submodule(name.rpartition(".")[0])
        if isinstance(factor := getattr(block, SHARED_FACTOR, None), nn.Linear):
            yield factor


def _linear(weight: Tensor) -> nn.Linear:
    """A linear with this weight (out, in)."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
