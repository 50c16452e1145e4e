"""Layer norms and RMS norms, whose gain g and bias b act on the normalised input z: one ridge problem per channel.

    J(g, b) = sum_t 1/n_t sum (g z + b - y)^2 + lam (g - g_A)^2 + lam (b - b_A)^2        y = g_t z_T + b_t

where z_T = (1 - alpha) z_X + alpha z_E lies between the student's and the teacher's z. A norm without bias is solved
for its gain alone; a norm without gain is not solved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from epmq_cli.calibrate.sharing import ALONE, Sharing

if TYPE_CHECKING:
    from torch import Tensor


def has_gain(norm: nn.Module) -> bool:
    """Whether a norm has a gain to solve; the norms of OLMo 1 have none."""
    return isinstance(getattr(norm, "weight", None), nn.Parameter)


def normalised(norm: nn.Module, rows: Tensor) -> Tensor:
    """The output of the norm for rows (tokens, width), before its gain and bias."""
    return _with_weight(norm, rows, 1 - unit(norm))


def unit(norm: nn.Module) -> float:
    """The number that the norm adds to its weight to get its gain: 1 in Gemma, 0 in other models."""
    weight = norm.get_parameter("weight")
    rows = torch.arange(1, len(weight) + 1, dtype=weight.dtype, device=weight.device)[None]
    return float(_with_weight(norm, rows, 0).detach().abs().max() > 0)


def _with_weight(norm: nn.Module, rows: Tensor, weight: float) -> Tensor:
    plain = {name: torch.full_like(p, 0 if name == "bias" else weight) for name, p in norm.named_parameters()}
    output: Tensor = functional_call(norm, plain, (rows,))
    return output


class NormObjective:
    """J of one norm, accumulated task by task in float64; `gain` and `bias` (width,) of the anchor, the bias None if it
    has none; `sharing`: splits the sums over processes."""

    def __init__(self, gain: Tensor, bias: Tensor | None, lam: float, sharing: Sharing = ALONE) -> None:
        self._gain, self._bias, self._lam = gain.double(), None if bias is None else bias.double(), lam
        self._sharing = sharing
        self._sums = torch.zeros(4, len(gain), dtype=torch.float64, device=gain.device)
        self._n = 0.0
        self._task_sums, self._task_n = torch.zeros_like(self._sums), 0.0

    def add(self, z: Tensor, taught: Tensor, weights: Tensor | None, gain: Tensor, bias: Tensor | None) -> None:
        """Adds a batch of one task: the student's z and z_T, both (tokens, width), the weights of the tokens (tokens,)
        or None for 1, and the expert's gain and bias."""
        z = z.double()
        rest = gain.double() * taught.double() - self._gain * z
        if bias is not None and self._bias is not None:
            rest += bias.double() - self._bias
        w = z.new_ones(len(z)) if weights is None else weights.double()
        self._task_sums += torch.stack([w @ z.square(), w @ z, w @ (z * rest), w @ rest])
        self._task_n += float(w.sum())

    def close(self, factor: float) -> None:
        """Ends a task, with its batches of all processes, and gives it the weight `factor`."""
        tokens = float(self._sharing.all_reduce(self._task_sums.new_tensor(self._task_n)))
        self._sums += factor / max(tokens, 1e-300) * self._sharing.all_reduce(self._task_sums)
        self._n += factor
        self._task_sums, self._task_n = torch.zeros_like(self._sums), 0.0

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """The best gain and bias; channels without a unique solution keep the anchor's."""
        zz, z, zy, y = self._sums
        a, d = zz + self._lam, self._n + self._lam
        if self._bias is None:
            return self._gain + torch.where(a > 0, zy / a.clamp(min=1e-300), 0.0), None
        determinant = a * d - z.square()
        safe = determinant > 1e-12 * a * d
        scale = torch.where(safe, 1 / torch.where(safe, determinant, 1.0), 0.0)
        return self._gain + scale * (d * zy - z * y), self._bias + scale * (a * y - z * zy)
