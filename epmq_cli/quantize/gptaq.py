"""GPTAQ (Li et al. 2025, https://arxiv.org/abs/2504.02692): GPTQ towards the outputs of the unquantized model.

With the inputs X behind quantized layers and E of the unquantized model, GPTAQ minimizes || X Q' - E W' ||^2.

Departure from the paper, which spreads w_j (E_j - X_j)'X over the columns after j, when column j is rounded: a column
makes up for those before it only. Here the guidance's target W* = W + W (E - X)'X H^-1 takes up the whole difference
before the first column is rounded, and GPTQ, given (W*, H), minimizes the same objective. Its loss is 5 to 40% lower
(tests/quantize/test_gptaq.py has the paper's loop), provided that H holds a small anchor, guidance.lam, in place of the
paper's damping: without it W* follows directions that have no energy, and its groups have a wider range.
"""

from __future__ import annotations

from dataclasses import dataclass

from epmq_cli.quantize.gptq import Gptq


@dataclass(frozen=True)
class Gptaq(Gptq):
    """`quant=gptaq`: GPTQ, which the guidance must give targets of a teacher's own activations (`guidance.alpha`)."""
