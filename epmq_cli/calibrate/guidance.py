"""What calibration is guided by: the options of `guidance=<name>`, each published method a setting of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from epmq_cli.config.validate import check_choice, check_range

TARGETS = ("merged", "expert")
TASK_WEIGHTS = ("frobenius", "tokens")
AUTO = "auto"
Auto = Literal["auto"]
MOST = 10**9
"""Of weights: nothing that is weighted less counts beside it, and sums in float32 still hold it."""
LIMITS = {"lam": MOST, "alpha": 1, "beta": 1, "rho": 10}
"""The options that can be `auto`, with the largest value of each; the smallest is 0."""


@dataclass(frozen=True)
class Guidance:
    """`guidance=<name>`.

    `targets`: whose outputs the linears shall give, `merged` (plain post-training quantization) or each task's
    `expert`. `lam`: weight of the anchor; with `task_weight: frobenius` a pure number. `alpha`: share of the teacher's
    own inputs in the target. `beta`: share of the residual stream's drift that a linear which writes into it makes up
    for. `rho`: the anchor is rho merged + (1 - rho) base. These four may be `auto`.

    `intercepts`, `norms`, `embeddings`, `readout`: whether biases, norms, the tables and kernels that make the first
    stream, and the linears between the blocks and the heads are solved as well. `readout_weight`: what the other
    tokens of the last block count beside the one that is read out, in (0, 1]. `heads`: `always`, `never` or `own`
    (where each task has a head of its own). `sweeps`: walks through the model, each anchored at the one before.
    `task_weight`: s_t, see moments.py. `weights`: factors on it by task, null for 1.
    """

    targets: str
    lam: float | Auto
    alpha: float | Auto
    beta: float | Auto
    rho: float | Auto
    intercepts: bool
    norms: bool
    embeddings: bool
    readout: bool
    readout_weight: float
    heads: str
    sweeps: int
    task_weight: str
    weights: Mapping[str, float] | None

    def __post_init__(self) -> None:
        check_choice("guidance.targets", self.targets, TARGETS)
        for name, limit in LIMITS.items():
            if getattr(self, name) != AUTO:
                check_range(f"guidance.{name}", getattr(self, name), 0, limit)
        for name in ("intercepts", "norms", "embeddings", "readout"):
            check_choice(f"guidance.{name}", getattr(self, name), (True, False))
        check_range("guidance.readout_weight", self.readout_weight, 0, 1, open_low=True)
        check_choice("guidance.heads", self.heads, ("always", "never", "own"))
        check_range("guidance.sweeps", self.sweeps, 1, 10, integer=True)
        check_choice("guidance.task_weight", self.task_weight, TASK_WEIGHTS)
        for task, weight in (self.weights or {}).items():
            check_range(f"guidance.weights.{task}", weight, 0, MOST)

    @property
    def open(self) -> list[str]:
        """The options that are still `auto`."""
        return [name for name in LIMITS if getattr(self, name) == AUTO]

    @property
    def teaches(self) -> bool:
        """Whether the teachers' own activations are needed."""
        return self.alpha != 0 or self.beta != 0

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration must measure inputs. Otherwise every part's target is the merged value itself."""
        solved = self.intercepts or self.norms or self.embeddings or self.readout
        return self.targets != "merged" or self.rho != 1 or self.teaches or solved

    def factor(self, task: str) -> float:
        """What the task's s_t is multiplied with."""
        return 1.0 if self.weights is None else self.weights.get(task, 1.0)
