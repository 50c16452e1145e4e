"""Oracles: a separable function whose minimum on the grid is known; partitions."""

from __future__ import annotations

from dataclasses import replace

from epmq_cli.calibrate.guidance import Guidance
from epmq_cli.calibrate.tune import GRID, choose
from tests.calibrate.test_guidance import PLAIN

BEST = {"lam": 0.01, "alpha": 0.3, "beta": 0.5, "rho": 2.0}


def error(guidance: Guidance) -> float:
    return sum(abs(float(getattr(guidance, name)) - best) for name, best in BEST.items())


def test_each_open_option_gets_its_best_value() -> None:
    found = choose(replace(PLAIN, lam="auto", alpha="auto", beta="auto", rho="auto"), error)
    assert {name: getattr(found.guidance, name) for name in BEST} == BEST
    assert found.guidance.open == []
    assert min(found.trials, key=lambda trial: trial["divergence"]) == {**BEST, "divergence": 0}


def test_fixed_options_stay_unchanged() -> None:
    found = choose(replace(PLAIN, lam="auto", rho=3), error)
    assert (found.guidance.lam, found.guidance.rho, found.guidance.alpha) == (0.01, 3, 0)
    assert len(found.trials) == len(GRID["lam"])


def test_nothing_is_tried_twice() -> None:
    asked: list[Guidance] = []

    def counted(guidance: Guidance) -> float:
        asked.append(guidance)
        return error(guidance)

    found = choose(replace(PLAIN, lam="auto", beta="auto"), counted)
    assert len(asked) == len({(g.lam, g.beta) for g in asked}) == len(found.trials)
    assert len(asked) == len(GRID["lam"]) + len(GRID["beta"]) - 1


def test_ties_go_to_the_first_value_and_fixed_guidance_needs_no_trials() -> None:
    found = choose(replace(PLAIN, beta="auto", alpha="auto"), lambda _: 1.0)
    assert (found.guidance.beta, found.guidance.alpha) == (GRID["beta"][0], GRID["alpha"][0])
    assert choose(PLAIN, error).trials == []
    assert choose(PLAIN, error).guidance == PLAIN


def test_later_options_are_tuned_at_the_best_earlier_values() -> None:
    """The best alpha depends on lam: it is tuned at the best lam, not at lam's starting value."""
    coupled = lambda g: (g.lam - 0.01) ** 2 + (g.alpha - (0.3 if g.lam == 0.01 else 1)) ** 2 * 1e-9  # noqa: E731
    assert choose(replace(PLAIN, lam="auto", alpha="auto"), coupled).guidance.alpha == 0.3


def test_grids_hold_allowed_values() -> None:
    for name, values in GRID.items():
        for value in values:
            assert getattr(replace(PLAIN, **{name: value}), name) == value  # type: ignore[arg-type]
