"""Oracle: a lone expert under merge=average equals that expert in transformers, in every parameter and in its
outputs, however it, its base and its adapter were saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.foreign.combinations import Combination, every, quick
from tests.end_to_end.foreign.conftest import Conclude
from tests.end_to_end.foreign.judge import judge, problems, run_merge
from tests.end_to_end.foreign.kinds import KINDS
from tests.end_to_end.foreign.savings import SAVINGS
from tests.end_to_end.foreign.users import base_of, dtype_of, expert_of, suite
from tests.end_to_end.foreign.wrappers import WRAPPERS

ALL = every()
QUICK = quick(ALL)


def trial(combination: Combination) -> Any:
    marks = [] if combination in QUICK else [pytest.mark.slow]
    return pytest.param(combination, id=str(combination), marks=marks)


@pytest.mark.parametrize("combination", [trial(combination) for combination in ALL])
def test_a_lone_expert_is_reproduced(combination: Combination, tmp_path: Path, store: Path, conclude: Conclude) -> None:
    kind, saving = KINDS[combination.kind], SAVINGS[combination.saving]
    base = base_of(combination, tmp_path, store)
    expert = expert_of(combination, base, tmp_path, store)
    coarsest = min((dtype_of(saving.base), expert.dtype), key=lambda dtype: dtype.itemsize)
    said = None if combination.adapter != "none" else WRAPPERS[combination.wrapper].said

    def attempt(folder: Path) -> Iterable[str]:
        made = run_merge(suite(kind, base, {"task": expert.path}), folder)
        return problems(kind, made, expert.parameters, expert.outputs, coarsest, said)

    conclude(judge(attempt, tmp_path / "out", combination.may_be_refused))


def test_the_tiers_have_their_documented_sizes() -> None:
    """At least 300 combinations; the 40 or more of the fast tier cover every value of every axis."""
    assert len(ALL) >= 300
    assert 40 <= len(QUICK) <= 80
    for axis, values in (("saving", SAVINGS), ("wrapper", WRAPPERS)):
        assert {getattr(combination, axis) for combination in QUICK} >= set(values) - {"plain", "none"}
