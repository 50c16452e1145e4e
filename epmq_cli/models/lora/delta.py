"""The LoRA formulas on tensors: the product, the residual of an initialization, and the magnitudes of DoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

GAP = 1e-6  # relative gap between two singular values; below it, the singular vectors are ambiguous


def product(parts: dict[str, Tensor], shape: tuple[int, ...], transposed: bool) -> Tensor:
    """B A, or B diag(d) A, in the shape of the weight. `transposed`: the weight is (in, out)."""
    if "lora_embedding_A" in parts:
        return (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
    b = parts["lora_B"].flatten(1)
    delta = (b * parts["lora_diag"] if "lora_diag" in parts else b) @ parts["lora_A"].flatten(1)
    return delta.T if transposed else delta.reshape(shape)


def residual(weight: Tensor, init: str, rank: int, scale: float, transposed: bool) -> Tensor:
    """The residual of the base's 2-D weight after an initialization, before training.

    `pissa` removes the `rank` largest singular values (https://arxiv.org/abs/2404.02948). `olora` removes the product
    of the first `rank` columns of Q and rows of R from the QR decomposition, times `scale`
    (https://arxiv.org/abs/2406.01775; PEFT decomposes a transposed weight as stored). `kasa` removes the `rank`
    smallest singular values (https://arxiv.org/abs/2412.06071). These products do not depend on the signs of the
    vectors.

    Raises ValueError if two singular values are equal, so that the residual is ambiguous.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        rest: Tensor = weight - scale * q[:, :rank] @ r[:rank]
        return rest
    matrix = weight.T if transposed else weight
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    cut = rank if init == "pissa" else max(len(s) - rank, 0)
    if 0 < cut < len(s) and not s[cut - 1] - s[cut] > GAP * s[0]:
        raise ValueError(f"singular values {cut} and {cut + 1} are equal")
    largest: Tensor = (u[:, :cut] * s[:cut]) @ vh[:cut]
    remainder = matrix - largest if init == "pissa" else largest
    return remainder.T if transposed else remainder


def with_lengths(adapted: Tensor, lengths: Tensor, columns: bool) -> Tensor:
    """Scales the rows, or the columns, to these lengths, as in DoRA (https://arxiv.org/abs/2402.09353, equation 5)."""
    if columns:
        column: Tensor = lengths.flatten() / torch.linalg.vector_norm(adapted, dim=0)
        return adapted * column
    scale: Tensor = lengths.flatten() / torch.linalg.vector_norm(adapted.flatten(1), dim=1)
    return adapted * scale.view(-1, *[1] * (adapted.ndim - 1))
