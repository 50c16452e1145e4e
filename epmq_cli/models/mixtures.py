"""The mixtures of experts that epmq calibrates, and the names of their modules in files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """The names in files: of the part of a block that holds router and experts, and of the linears of an expert."""

    block: str
    gate: str
    up: str
    down: str


QWEN = Names("mlp", "gate_proj", "up_proj", "down_proj")
MIXTURES = {"mixtral": Names("block_sparse_moe", "w1", "w3", "w2"), "olmoe": QWEN, "qwen2_moe": QWEN, "qwen3_moe": QWEN}
"""By model type."""
BLOCK, ROUTER, EXPERTS, SHARED_FACTOR = "mlp", "gate", "experts", "shared_expert_gate"
"""The names of modules in transformers: of the part of a block, and in it of router, experts and the factor of a shared
expert."""
STACKED = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
"""The ends of the names of tensors that hold all experts of a block."""


def router_of(experts: str) -> str:
    """The name of the router of the experts of this name."""
    return f"{experts.removesuffix(EXPERTS)}{ROUTER}"
