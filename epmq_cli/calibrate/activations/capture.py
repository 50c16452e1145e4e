"""Captures the layer inputs of paused forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.moments import real_tokens, tokens_of
from epmq_cli.data.microbatch import joined
from epmq_cli.families.structure import Linears, Norm


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a step in one batch.

    `student` and `teacher`: rows (tokens, width) of the step's input and, if captured, of the residual stream.
    `weights`: the weights of the tokens; None if all are 1. `held`: which tokens are of samples that are held out; None
    if nothing is.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None
    held: Tensor | None = None

    def copied(self) -> LayerInputs:
        """Copies of the rows. They stay valid when the forward passes continue."""
        own = [rows.clone() for rows in self.student]
        return replace(
            self, student=own, teacher=own if self.teacher is self.student else [rows.clone() for rows in self.teacher]
        )

    @classmethod
    def joined(cls, parts: Sequence[LayerInputs]) -> LayerInputs:
        """Joins the layer inputs of the parts of one batch."""
        own = [joined(rows) for rows in zip(*(part.student for part in parts), strict=True)]
        same = parts[0].teacher is parts[0].student
        other = own if same else [joined(rows) for rows in zip(*(part.teacher for part in parts), strict=True)]
        weights, held = (
            [one for one in each if one is not None]
            for each in ([part.weights for part in parts], [part.held for part in parts])
        )
        return cls(own, other, joined(weights) if weights else None, joined(held) if held else None)

    def parts(self) -> list[LayerInputs]:
        """The rows of the tokens that are not held out and of those that are; all rows if nothing is held out."""
        return [self] if self.held is None else [self._of(~self.held), self._of(self.held)]

    def _of(self, tokens: Tensor) -> LayerInputs:
        own = [rows[tokens] for rows in self.student]
        other = own if self.teacher is self.student else [rows[tokens] for rows in self.teacher]
        return LayerInputs(own, other, None if self.weights is None else self.weights[tokens])


@dataclass(frozen=True)
class CaptureSpec:
    """Specifies where passes pause: in front of the first call of a module in `names`.

    `stream`: an earlier module whose input is also captured. `capture`: modules whose inputs this or a later step
    needs. `token`: the token whose rows have weight 1; None if all have weight 1. `memory`: whether the step reads the
    output of another stack. `scale`: see Linears.
    """

    names: tuple[str, ...]
    stream: str | None
    capture: frozenset[str]
    token: int | None
    memory: bool
    scale: float = 1.0

    @classmethod
    def of(cls, steps: Sequence[Linears | Norm], token: int | None) -> CaptureSpec:
        """The spec of the first of `steps`, which are followed by the others. `token`: the token that is read out."""
        step, capture = steps[0], frozenset(s.stream for s in steps if isinstance(s, Linears) and s.stream)
        if isinstance(step, Norm):
            return cls((step.name,), None, capture, None if step.mixing else token, False)
        return cls(step.names, step.stream, capture, token, step.memory, step.scale)

    def rows(self, stream: HiddenState, module: nn.Module) -> list[Tensor]:
        """Runs the pass of a hidden state up to the step. Returns rows of real tokens (tokens, width)."""
        captured = [stream.run_until(module, self.names, self.capture)]
        if self.stream is not None:
            captured.append(stream.captured(self.stream))
        mask = stream.memory if self.memory else stream.mask
        return [real_tokens(rows, mask) for rows in captured]

    def tokens_of(self, samples: Tensor, stream: HiddenState, count: int) -> Tensor:
        """Which of `count` rows are of some samples, (tokens,); `samples`: a mask (samples,)."""
        mask = stream.memory if self.memory else stream.mask
        return tokens_of(samples.to(stream.hidden.device), mask, count)
