"""The mixture of Llama 4, with the router and the experts of other mixtures, and the model around it.

Its router gives a sigmoid of the score of each chosen expert, which scales what the expert reads, not what it writes.
The sum of the experts and the shared one is added to the stream.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama4 import modeling_llama4
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextMoe


class Router(Llama4Router):  # type: ignore[misc]  # transformers is not typed
    """A router that returns what those of other mixtures do."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores (tokens, experts), and the factors and numbers of each token's experts (tokens, k)."""
        scores = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        chosen, experts = torch.topk(scores, self.top_k, dim=1)
        return scores, torch.sigmoid(chosen.float()).to(scores.dtype), experts


class Mixture(Llama4TextMoe):  # type: ignore[misc]
    """The mixture, which calls each expert on its own tokens."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and the scores of the router (tokens, ...)."""
        rows = hidden_states.reshape(-1, self.hidden_dim)
        scores, factors, experts = self.router(rows)
        return self.experts(rows, experts, factors) + self.shared_expert(rows), scores


class Llama4ForConditionalGeneration(modeling_llama4.Llama4ForConditionalGeneration):  # type: ignore[misc]
    """The model, which has the outputs of its language model for texts. transformers 5.24 computes them and then fails,
    because it looks for an attribute `image_outputs` in them."""

    @wraps(modeling_llama4.Llama4ForConditionalGeneration.forward)  # its arguments tell what takes the cache
    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **options: Any) -> Any:
        """The outputs of the language model, or what transformers makes of pictures."""
        if pixel_values is None:
            return self.language_model(input_ids=input_ids, **options)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **options)


def with_routing(model: Any) -> None:
    """Gives a model of Llama 4 these classes. Its tensors stay the same."""
    for module in model.modules():
        if type(module) is Llama4TextMoe:
            module.__class__, module.router.__class__ = Mixture, Router
    if type(model) is modeling_llama4.Llama4ForConditionalGeneration:
        model.__class__ = Llama4ForConditionalGeneration
