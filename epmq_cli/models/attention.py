"""The attentions of a model that cache keys and values, and what they cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHES = ("cache", "past_key_values")
"""The argument of a module that takes the cache, in newer and older versions of transformers."""


def cached_attentions(model: nn.Module) -> list[str]:
    """The names of the attentions that take a cache of keys and values, in the order of the model: the innermost such
    modules; blocks that hand a cache on are none."""
    names = [name for name, module in model.named_modules() if name and cache_argument(module) is not None]
    inner = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return [name for name in inner if "att" in name.rpartition(".")[2]]


class Recorder:
    """Takes the place of a cache. Keeps the largest magnitudes of keys and of values that were added, and nothing else;
    `seen` is None until some are. `mask` (samples, tokens): the real tokens of the next pass; None if all are."""

    def __init__(self) -> None:
        self.seen: tuple[float, float] | None = None
        self.mask: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The keys and values (samples, heads, tokens, width) themselves, as of an empty cache."""
        own, before = tuple(_largest(part, self.mask) for part in (keys, values)), self.seen or (0.0, 0.0)
        self.seen = max(own[0], before[0]), max(own[1], before[1])
        return keys, values

    def get_seq_length(self, *layer: int) -> int:
        """The number of cached tokens, which the attention of Llama 4 asks for."""
        return 0


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Recorder]]:
    """Inside the context, forward passes record what each of these attentions would cache, rotary embeddings included.
    Yields the recorders by name."""
    recorders = {name: Recorder() for name in names}

    def hook(recorder: Recorder) -> Any:
        return lambda module, args, options: (args, {**options, cache_argument(module): recorder})

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(recorder), with_kwargs=True)
        for name, recorder in recorders.items()
    ]
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()


def cache_argument(module: nn.Module) -> str | None:
    """The argument of a module that takes the cache; None if it has none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def _largest(tensor: Tensor, mask: Tensor | None) -> float:
    low, high = (tensor if mask is None else tensor.transpose(1, 2)[mask]).aminmax()
    return max(-float(low), float(high))
