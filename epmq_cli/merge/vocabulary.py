"""Vocabularies of different sizes: finds the tensors with a row per token, and fills in the rows that the base
lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.models.model_folder import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


def is_over_vocabulary(
    base: TensorInfo, base_config: Mapping[str, Any], expert: TensorInfo, expert_config: Mapping[str, Any]
) -> bool:
    """Whether two tensors differ only in their rows, and have as many rows as the `vocab_size` of their configs.

    An expert without its own config, such as an adapter, uses the base's; its rows are not checked.
    """
    return (
        base.shape[1:] == expert.shape[1:]
        and base.shape[:1] == (vocabulary_of(base_config),)
        and (expert_config is base_config or expert.shape[:1] == (vocabulary_of(expert_config),))
    )


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """The `vocab_size` of a config, or of its text model."""
    size: int | None = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return size


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with another `vocab_size`, in the section that has one."""
    text = config.get("text_config")
    if "vocab_size" not in config and isinstance(text, dict) and "vocab_size" in text:
        return {**config, "text_config": {**text, "vocab_size": size}}
    return {**config, "vocab_size": size}


def mean_rows(tables: Sequence[Tensor]) -> Tensor:
    """(rows of the longest table, ...): the mean, row by row, over the tables that have the row."""
    longest = max(tables, key=len)
    total, count = torch.zeros_like(longest), torch.zeros(len(longest))
    for table in tables:
        total[: len(table)] += table
        count[: len(table)] += 1
    return total / count.view(-1, *[1] * (total.ndim - 1))
