"""Oracle: the mean of two experts in plain torch, however each of them was saved; `epmq verify` accepts the result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.foreign.conftest import Conclude
from tests.end_to_end.foreign.judge import judge, problems, run_merge
from tests.end_to_end.foreign.kinds import KINDS
from tests.end_to_end.foreign.pairs import Pair, every_pair, mean, mean_outputs, quick_pairs
from tests.end_to_end.foreign.savings import SAVINGS
from tests.end_to_end.foreign.users import base_of, dtype_of, expert_of, suite

ALL = every_pair()
QUICK = quick_pairs(ALL)


def trial(pair: Pair) -> Any:
    return pytest.param(pair, id=str(pair), marks=[] if pair in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("pair", [trial(pair) for pair in dict.fromkeys(ALL)])
def test_the_average_of_two_experts_is_their_mean(pair: Pair, tmp_path: Path, store: Path, conclude: Conclude) -> None:
    kind, saving = KINDS[pair.first.kind], SAVINGS[pair.first.saving]
    base = base_of(pair.first, tmp_path, store)
    experts = [
        expert_of(pair.first, base, tmp_path / "a", store, "a"),
        expert_of(pair.second, base, tmp_path / "b", store, "b", saving.base),
    ]
    types = [dtype_of(saving.base), *(expert.dtype for expert in experts)]
    coarsest = min(types, key=lambda dtype: (dtype.itemsize, str(dtype)))
    wanted = mean([expert.parameters for expert in experts])

    def attempt(folder: Path) -> Iterable[str]:
        made = run_merge(suite(kind, base, {"a": experts[0].path, "b": experts[1].path}), folder)
        return problems(kind, made, wanted, mean_outputs(kind, wanted), coarsest)

    conclude(judge(attempt, tmp_path / "out", pair.may_be_refused))
