"""The options of `guidance=<name>`. Each published method is a setting of them."""

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
"""The largest weight. Terms of smaller weight are negligible beside it, and float32 sums do not overflow."""
LIMITS = {"lam": MOST, "alpha": 1, "beta": 1, "rho": 10}
"""The options that can be `auto`, with the largest value of each; the smallest is 0."""


@dataclass(frozen=True)
class Guidance:
    """`guidance=<name>`.

    `targets`: the regression targets of the linears: the outputs of the `merged` model (plain post-training
    quantization) or of each task's `expert`. `lam`: the weight of the anchor; with `task_weight: frobenius` it is
    dimensionless. `alpha`: the share of the teacher's own inputs in the target. `beta`: the share of the residual
    stream's drift that linears compensate when they write into the stream. `rho`: the anchor is
    rho merged + (1 - rho) base. These four may be `auto`.

    `intercepts`, `norms`, `embeddings`, `readout`: whether calibration also solves biases, norms, the tables and
    kernels that compute the first hidden state, and the linears between the blocks and the heads. `readout_weight`: the
    weight in (0, 1] of the tokens of the last block that the head does not read. `heads`: whether heads are solved:
    `always`, `never` or `own` (if each task has its own head). `sweeps`: the number of walks through the model, each
    anchored at the result of the one before. `task_weight`: s_t, see moments.py. `weights`: factors on s_t by task,
    null for 1. `safe`: whether a fifth of the samples is held out and decides how far each group of linears moves from
    its merged weights towards its target. `prompt_weight`: the weight in (0, 1] of the
    tokens of conversations that are not the assistant's.
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
    safe: bool = False
    prompt_weight: float = 1

    def __post_init__(self) -> None:
        check_choice("guidance.targets", self.targets, TARGETS)
        for name, limit in LIMITS.items():
            if getattr(self, name) != AUTO:
                check_range(f"guidance.{name}", getattr(self, name), 0, limit)
        for name in ("intercepts", "norms", "embeddings", "readout", "safe"):
            check_choice(f"guidance.{name}", getattr(self, name), (True, False))
        check_range("guidance.readout_weight", self.readout_weight, 0, 1, open_low=True)
        check_choice("guidance.heads", self.heads, ("always", "never", "own"))
        check_range("guidance.prompt_weight", self.prompt_weight, 0, 1, open_low=True)
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
        """Whether calibration needs the teachers' own activations."""
        return self.alpha != 0 or self.beta != 0

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration must measure inputs. If not, the target of every part is its merged value."""
        solved = self.intercepts or self.norms or self.embeddings or self.readout
        return self.targets != "merged" or self.rho != 1 or self.teaches or solved

    def factor(self, task: str) -> float:
        """The factor on the task's s_t."""
        return 1.0 if self.weights is None else self.weights.get(task, 1.0)
