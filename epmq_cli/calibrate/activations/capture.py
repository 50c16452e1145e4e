"""What is read of the passes that wait in front of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from epmq_cli.calibrate.activations.hidden_state import HiddenState
from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.data.microbatch import joined
from epmq_cli.families.structure import Linears, Norm


@dataclass(frozen=True)
class LayerInputs:
    """What reaches a step in one batch: the student's and the teacher's rows (tokens, width), of the step itself and of
    the residual stream if it is asked for, and the weights of the tokens, or None for 1."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None

    def copied(self) -> LayerInputs:
        """Rows that stay when the passes they were read of go on."""
        own = [rows.clone() for rows in self.student]
        return replace(
            self, student=own, teacher=own if self.teacher is self.student else [rows.clone() for rows in self.teacher]
        )

    @classmethod
    def joined(cls, parts: Sequence[LayerInputs]) -> LayerInputs:
        """Those of a batch that came in parts."""
        own = [joined(rows) for rows in zip(*(part.student for part in parts), strict=True)]
        same = parts[0].teacher is parts[0].student
        other = own if same else [joined(rows) for rows in zip(*(part.teacher for part in parts), strict=True)]
        weights = [part.weights for part in parts if part.weights is not None]
        return cls(own, other, joined(weights) if weights else None)


@dataclass(frozen=True)
class CaptureSpec:
    """Where passes shall wait: in front of that one of `names` which is called first.

    `stream`: the module before it whose input is asked for too; `wanted`: those whose input still will be. `token`: the
    one whose rows count in full, or None where all do; `memory`: whether the output of another stack is read; `scale`:
    see Linears.
    """

    names: tuple[str, ...]
    stream: str | None
    wanted: frozenset[str]
    token: int | None
    memory: bool
    scale: float = 1.0

    @classmethod
    def of(cls, steps: Sequence[Linears | Norm], token: int | None) -> CaptureSpec:
        """Of the first of some steps, the others being those that follow; `token`: the one that is read out behind."""
        step, wanted = steps[0], frozenset(s.stream for s in steps if isinstance(s, Linears) and s.stream)
        if isinstance(step, Norm):
            return cls((step.name,), None, wanted, None if step.mixing else token, False)
        return cls(step.names, step.stream, wanted, token, step.memory, step.scale)

    def rows(self, stream: HiddenState, module: nn.Module) -> list[Tensor]:
        """The rows of real tokens (tokens, width) of a stream in a section."""
        reached = [stream.run_until(module, self.names, self.wanted)]
        if self.stream is not None:
            reached.append(stream.captured(self.stream))
        mask = stream.memory if self.memory else stream.mask
        return [real_tokens(rows, mask if rows.ndim > 2 else None) for rows in reached]
