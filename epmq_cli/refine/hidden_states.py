"""The hidden states behind blocks, on which a student can be trained as well (FitNets, https://arxiv.org/abs/1412.6550)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from epmq_cli.calibrate.moments import real_tokens
from epmq_cli.data.batching import Batch
from epmq_cli.errors import ConfigError
from epmq_cli.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor, nn


def chosen(numbers: Sequence[int] | None, family: Family, model: nn.Module) -> tuple[int, ...]:
    """The numbers of the chosen blocks, from 0; None for all. ConfigError if the model has no such block."""
    every = range(len(family.blocks(model)))
    for number in numbers or ():
        if number not in every:
            raise ConfigError(f"refine.hidden_blocks must hold numbers from 0 to {len(every) - 1}, got {number}")
    return tuple(every) if numbers is None else tuple(numbers)


@contextmanager
def captured(family: Family, model: nn.Module, batch: Batch, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A mapping that a forward pass of the batch fills with the hidden states (tokens, width) behind the blocks of
    these numbers: of real tokens, and behind a stack's last block only of the token that heads read, if it is one."""
    found: dict[int, Tensor] = {}
    blocks = [(block, stack) for stack in family.stacks(model) for block in stack.blocks] if numbers else []
    with ExitStack() as hooks:
        for number in numbers:
            block, stack = blocks[number]
            token = stack.lone_token if block is stack.blocks[-1] else None
            mask = stack.mask(batch)

            def keep(
                module: nn.Module,
                arguments: Any,
                output: Any,
                number: int = number,
                token: int | None = token,
                mask: Tensor | None = mask,
            ) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                found[number] = real_tokens(hidden, mask) if token is None else hidden[:, token]

            hooks.callback(block.module.register_forward_hook(keep).remove)
        yield found
