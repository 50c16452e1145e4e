"""`guidance.safe`: tokens that are held out decide how far a group of linears moves from its merged weights M towards
its target.

On the held-out tokens, J(M + step (W - M)) is a parabola in the step if W is the solution for the other tokens. Its
minimum between 0 and 1 is the step for the solution for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.calibrate.quadratic import QuadraticProblem
from epmq_cli.calibrate.row_pieces import row_pieces
from epmq_cli.runtime.products import fast_products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A `share` in [0, 1] of the way from the `merged` weights (out, in) to a target."""

    merged: Tensor
    share: float

    def towards(self, target: Tensor) -> Tensor:
        """The weights (out, in) after the step."""
        if self.share == 1:
            return target
        merged = self.merged.double()
        return target.sub(merged).mul_(self.share).add_(merged)


@fast_products()
def best_step(solution: Tensor, held: QuadraticProblem, merged: Tensor) -> Step:
    """The step of least J on the held-out tokens; the whole way if they see no difference. Biases are the best ones.

    `solution` (out, in): W* of the other tokens; `held`: the problem of the held-out ones, with lam 0.
    """
    dtype = held.anchor.weight.dtype  # that of large products
    H, curvature, slope = held.H.to(dtype), 0.0, 0.0
    for rows in row_pieces(slice(0, len(merged)), merged.shape[1]):
        own = merged[rows].double()
        start, way = own - held.anchor.weight[rows].double(), solution[rows] - own
        curved = (way.to(dtype) @ H).double()
        curvature += float((curved * way).sum())
        slope += float((way * held.S[rows]).sum() - (curved * start).sum())
    return Step(merged, min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 1.0)
