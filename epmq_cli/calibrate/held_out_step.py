"""`guidance.safe`: tokens that are held out decide how far a group of linears moves from its merged weights M towards
its target.

On the held-out tokens, J(M + step (W - M)) is a parabola in the step if W is the solution for the other tokens. Its
minimum between 0 and 1 is the step for the solution for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epmq_cli.calibrate.quadratic import QuadraticProblem
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
        return target if self.share == 1 else self.merged + self.share * (target - self.merged)


@fast_products()
def best_step(fitted: QuadraticProblem, held: QuadraticProblem, merged: Tensor) -> Step:
    """The step of least J on the held-out tokens; the whole way if they see no difference. Biases are the best ones.

    `fitted`: the problem of the other tokens; `held`: that of the held-out ones, with lam 0.
    """
    merged = merged.double()
    start, way = merged - held.anchor.weight.double(), fitted.solve()[0] - merged
    dtype = held.anchor.weight.dtype  # that of large products
    curved = (way.to(dtype) @ held.H.to(dtype)).double()
    curvature = float((curved * way).sum())
    slope = float((way * held.S).sum() - (curved * start).sum())
    return Step(merged, min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 1.0)
