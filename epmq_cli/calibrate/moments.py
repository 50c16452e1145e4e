"""Statistics of a linear's inputs. Moments are sums over tokens: they add up over batches, processes and machines."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def real_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The input rows (tokens, in) of a linear whose input is (samples, tokens, in); `mask` (samples, tokens) drops
    padding."""
    return inputs.flatten(0, -2) if mask is None else inputs[mask]


def second_moment(batches: Iterable[Tensor]) -> tuple[Tensor, int]:
    """X'X (in, in) in float64 and the number of tokens, over batches of rows (tokens, in).

    Products are made in the type of the rows and summed in float64, so that the result does not drift with their
    number.
    """
    total, tokens = None, 0
    for rows in batches:
        product = (rows.T @ rows).double()
        total = product if total is None else total + product
        tokens += len(rows)
    if total is None:
        raise ValueError("no batch of rows to take moments of")
    return total, tokens


def task_weight(moment: Tensor, tokens: int, kind: str) -> float:
    """s_t: `frobenius` 1 / ||X'X||_F, so that tasks of different scale count alike; `tokens` 1 / tokens. 0 for no
    signal."""
    size = float(torch.linalg.norm(moment)) if kind == "frobenius" else float(tokens)
    return 1 / size if size > 0 else 0.0
