"""The mixtures of experts that epmq calibrates, and the names of their modules in files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """The names in files: of the part of a block that holds router and experts, and of the linears of an expert.
    `module` and `router`: the names in transformers of that part, and of the router in it."""

    block: str
    gate: str
    up: str
    down: str
    module: str = "mlp"
    router: str = "gate"


LINEARS = ("gate_proj", "up_proj", "down_proj")
QWEN, LLAMA4 = Names("mlp", *LINEARS), Names("feed_forward", *LINEARS, "feed_forward", "router")
MIXTURES = {
    "mixtral": Names("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), QWEN),
    **dict.fromkeys(("llama4", "llama4_text"), LLAMA4),
}
"""By model type."""
EXPERTS, SHARED_FACTOR = "experts", "shared_expert_gate"
"""The names of modules in transformers: of experts in the part of a block, and of the factor of a shared expert."""
STACKED = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
"""The ends of the names of tensors that hold all experts of a block."""


def router_of(experts: str, router: str) -> str:
    """The name of the router beside the experts of this name. `router`: its name there."""
    return f"{experts.removesuffix(EXPERTS)}{router}"
