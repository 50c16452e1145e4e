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
MIXTRAL = Names("block_sparse_moe", "w1", "w3", "w2")
QWEN, LLAMA4 = Names("mlp", *LINEARS), Names("feed_forward", *LINEARS, "feed_forward", "router")
MIXTURES = {
    "mixtral": MIXTRAL,
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), QWEN),
    **dict.fromkeys(("llama4", "llama4_text"), LLAMA4),
}
"""By model type."""
EXPERTS, SHARED_FACTOR = "experts", "shared_expert_gate"
"""The names of modules in transformers: of experts in the part of a block, and of the factor of a shared expert."""
PARAMETERS = ("gate_up_proj", "down_proj")
"""The names of the tensors of transformers that hold all experts of a block."""
STACKED = tuple(f"{EXPERTS}.{name}" for name in PARAMETERS)
"""The ends of their names in a model."""


def router_of(experts: str, router: str) -> str:
    """The name of the router beside the experts of this name. `router`: its name there."""
    return f"{experts.removesuffix(EXPERTS)}{router}"
