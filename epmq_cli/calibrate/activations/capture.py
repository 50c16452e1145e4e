"""Captures the layer inputs of paused forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.moments import real_tokens, tokens_of
from epmq_cli.data.microbatch import joined
from epmq_cli.families.structure import Linears, Norm, Route


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
        weights = [part.weights for part in parts if part.weights is not None]
        held = [part.held for part in parts if part.held is not None]
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
    output of another stack. `scale` and `route`: see Linears.
    `ran`: the only modules with weights behind the pause of the step before, if that is known; experts have many steps.
    """

    names: tuple[str, ...]
    stream: str | None
    capture: frozenset[str]
    token: int | None
    memory: bool
    scale: float = 1.0
    route: Route | None = None
    ran: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, steps: Sequence[Linears | Norm], token: int | None, before: Linears | Norm | None = None
    ) -> CaptureSpec:
        """The spec of the first of `steps`, which are followed by the others. `token`: the token that is read out.
        `before`: the step in front of them."""
        step, capture = steps[0], frozenset(s.stream for s in steps if isinstance(s, Linears) and s.stream)
        if isinstance(step, Norm):
            return cls((step.name,), None, capture, None if step.mixing else token, False)
        ran = before.names if step.route and isinstance(before, Linears) and before.route else None
        return cls(step.names, step.stream, capture, token, step.memory, step.scale, step.route, ran)

    def rows(self, stream: HiddenState, module: nn.Module) -> list[Tensor]:
        """Runs the pass of a hidden state up to the step. Returns rows of real tokens (tokens, width)."""
        captured = [stream.run_until(module, self.names, self.capture)]
        if self.stream is not None:
            captured.append(stream.captured(self.stream))
        mask = stream.memory if self.memory else stream.mask
        if self.route is not None:
            tokens, real = stream.router[self.route.router].tokens(self.route.expert, mask)
            captured[1:] = [rows.flatten(0, -2)[tokens] for rows in captured[1:]]
            return captured if real is None else [rows[real] for rows in captured]
        return [real_tokens(rows, mask) for rows in captured]

    def tokens_of(self, samples: Tensor, stream: HiddenState, count: int) -> Tensor:
        """Which of `count` rows are of some samples, (tokens,); `samples`: a mask (samples,)."""
        mask, samples = stream.memory if self.memory else stream.mask, samples.to(stream.hidden.device)
        routed = self._routed(stream)
        if routed is None:
            return tokens_of(samples, mask, count)
        every = stream.hidden[..., 0].numel() if mask is None else int(mask.sum())
        return tokens_of(samples, mask, every)[routed]

    def weights(self, stream: HiddenState, guidance: Guidance) -> Tensor | None:
        """The weights of the rows (tokens,); None if all are 1."""
        weights, routed = stream.weights(self.token, guidance), self._routed(stream)
        return weights if weights is None or routed is None else weights[routed]

    def _routed(self, stream: HiddenState) -> Tensor | None:
        """The real tokens that an expert reads, by their number among all real ones (rows,); None for all."""
        if self.route is None:
            return None
        tokens, real = stream.router[self.route.router].tokens(self.route.expert, stream.mask)
        return tokens if stream.mask is None else (stream.mask.flatten().cumsum(0) - 1)[tokens[real]]
