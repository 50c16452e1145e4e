"""The tokens of a forward pass that routers send to experts: a pass records them, or repeats those of another pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The experts of each token (tokens, k), padding included, and their factors (tokens, k)."""

    experts: Tensor
    factors: Tensor

    def tokens(self, expert: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens (rows,) that an expert reads, in their order, and which of these rows are real (rows,), None for
        all. `mask` (samples, tokens): the real tokens."""
        tokens = torch.where(self.experts == expert)[0]
        return tokens, None if mask is None else mask.flatten()[tokens]


class Router:
    """The routings of one pass, by the names of routers. `leader`: the pass whose routings this one repeats; None if
    its routers decide."""

    def __init__(self, leader: Router | None = None) -> None:
        self.leader = leader
        self.routings: dict[str, Routing] = {}

    def __getitem__(self, name: str) -> Routing:
        return self.routings[name] if self.leader is None else self.leader[name]

    def route(self, name: str, output: Any) -> Any:
        """The output of a router of transformers: logits, factors and experts. Copies are kept, because the activations
        of a waiting pass may go to files."""
        logits, factors, experts = output
        if self.leader is None:
            self.routings[name] = Routing(experts.clone(), factors.clone())
            return output
        own = self[name]
        return logits, own.factors.clone(), own.experts.clone()
