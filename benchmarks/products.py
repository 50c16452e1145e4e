"""Measures products in float32 on the CPU as torch computes them by default and as epmq does (runtime/products.py).

    python benchmarks/products.py

One thread. The numbers are milliseconds of processor time, medians of calls in turn, of matrices of CLIP-ViT-B/32 and
of a Llama with the shapes of a block of SmolLM2-135M. The error is that of epmq's product relative to float64. On
processors for which epmq has no faster library, both columns are the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from epmq_cli.models.fast_linears import fast_linears
from epmq_cli.runtime.products import exact_products, fast_products

ROUNDS = 9
TOKENS = 3200


def milliseconds(sides: list[Callable[[], object]]) -> list[float]:
    """The median time of each call, in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS + 1):  # the first does not count
        for own, side in zip(times, sides, strict=True):
            start = time.process_time()
            side()
            own.append(1000 * (time.process_time() - start))
    return [statistics.median(own[1:]) for own in times]


def fast(call: Callable[[], object]) -> Callable[[], object]:
    """The call with epmq's products."""

    def with_them() -> object:
        with fast_products():
            return call()

    return with_them


def show(name: str, times: list[float], error: float | None = None) -> None:
    """Prints a row."""
    default, own = times
    print(f"| {name} | {default:.1f} | {own:.1f} | {default / own:.2f} | {'' if error is None else f'{error:.0e}'} |")


def product(name: str, a: Tensor, b: Tensor) -> None:
    """A row for a b."""
    expected = a.double() @ b.double()
    with fast_products():
        error = float(((a @ b).double() - expected).norm() / expected.norm())
    show(name, milliseconds([lambda: a @ b, fast(lambda: a @ b)]), error)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    exact_products(torch.device("cpu"))
    print("| | torch, ms | epmq, ms | times as fast | error |\n|---|---|---|---|---|")
    narrow, wide, weight = torch.randn(TOKENS, 768), torch.randn(TOKENS, 3072), torch.randn(3072, 768)
    product("linear 768 to 3072", narrow, weight.T)
    product("linear 3072 to 768", wide, weight)
    product("moments of 768 inputs", narrow.T, narrow)
    product("moments of 3072 inputs", wide.T, wide)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, vocab_size=8
    )
    model, ids = LlamaModel(config), torch.zeros(4, 256, dtype=torch.long)

    def run(kind: Callable[[nn.Module], object], train: bool) -> None:
        with kind(model), torch.set_grad_enabled(train):  # type: ignore[attr-defined]
            output = model(input_ids=ids, use_cache=False).last_hidden_state
            if train:
                model.zero_grad()
                output.sum().backward()

    kinds: tuple[Callable[[nn.Module], object], ...] = (lambda _: nullcontext(), fast_linears)
    for name, train in (("block of a Llama", False), ("the same with gradients", True)):
        show(name, milliseconds([lambda kind=kind, train=train: run(kind, train) for kind in kinds]))  # type: ignore[misc]


if __name__ == "__main__":
    main()
