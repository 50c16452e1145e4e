"""Oracles: the documented error messages, and the fields themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from epmq_cli.calibrate.guidance import LIMITS, Guidance
from epmq_cli.errors import ConfigError

PLAIN = Guidance(
    targets="expert",
    lam=0.05,
    alpha=0,
    beta=0,
    rho=1,
    intercepts=False,
    norms=False,
    embeddings=False,
    readout=False,
    readout_weight=1,
    heads="never",
    sweeps=1,
    task_weight="frobenius",
    weights=None,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "experts"}, "guidance.targets must be one of merged, expert, got 'experts'"),
        ({"lam": -1}, r"guidance.lam must be a number in \[0, 1000000000\], got -1"),
        ({"lam": float("nan")}, r"guidance.lam must be a number in \[0, 1000000000\], got nan"),
        ({"lam": float("inf")}, r"guidance.lam must be a number in \[0, 1000000000\], got inf"),
        ({"lam": 1e300}, r"guidance.lam must be a number in \[0, 1000000000\], got 1e\+300"),
        ({"lam": "some"}, r"guidance.lam must be a number in \[0, 1000000000\], got 'some'"),
        ({"alpha": 1.5}, r"guidance.alpha must be a number in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, r"guidance.beta must be a number in \[0, 1\], got -0.1"),
        ({"rho": 11}, r"guidance.rho must be a number in \[0, 10\], got 11"),
        ({"rho": True}, r"guidance.rho must be a number in \[0, 10\], got true"),
        ({"alpha": None}, r"guidance.alpha must be a number in \[0, 1\], got null"),
        ({"intercepts": 1}, "guidance.intercepts must be one of true, false, got 1"),
        ({"norms": "yes"}, "guidance.norms must be one of true, false, got 'yes'"),
        ({"embeddings": None}, "guidance.embeddings must be one of true, false, got null"),
        ({"readout": 0}, "guidance.readout must be one of true, false, got 0"),
        ({"readout_weight": 0}, r"guidance.readout_weight must be a number in \(0, 1\], got 0"),
        ({"heads": True}, "guidance.heads must be one of always, never, own, got true"),
        ({"sweeps": 0}, r"guidance.sweeps must be a whole number in \[1, 10\], got 0"),
        ({"sweeps": 1.5}, r"guidance.sweeps must be a whole number in \[1, 10\], got 1.5"),
        ({"sweeps": "auto"}, r"guidance.sweeps must be a whole number in \[1, 10\], got 'auto'"),
        ({"readout_weight": 1.1}, r"guidance.readout_weight must be a number in \(0, 1\], got 1.1"),
        ({"task_weight": "size"}, "guidance.task_weight must be one of frobenius, tokens, got 'size'"),
        ({"weights": {"trec": -1}}, r"guidance.weights.trec must be a number in \[0, 1000000000\], got -1"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message + "$") as raised:
        replace(PLAIN, **fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [{name: "auto"} for name in LIMITS]
    + [{name: bound} for name, limit in LIMITS.items() for bound in (0, min(limit, 1e6))]
    + [{"readout_weight": 1e-9}, {"sweeps": 10}, {"heads": "own"}, {"weights": {}}, {"weights": {"trec": 0}}],
)
def test_bounds_are_allowed_values(fields: dict[str, Any]) -> None:
    found = replace(PLAIN, **fields)
    assert {name: getattr(found, name) for name in fields} == fields


def test_open_options_are_those_that_are_auto() -> None:
    assert PLAIN.open == []
    assert replace(PLAIN, lam="auto", rho="auto").open == ["lam", "rho"]


@pytest.mark.parametrize(
    ("fields", "teaches"), [({}, False), ({"alpha": 0.3}, True), ({"beta": 1}, True), ({"alpha": "auto"}, True)]
)
def test_teachers_are_needed_for_alpha_and_beta(fields: dict[str, Any], teaches: bool) -> None:
    assert replace(PLAIN, **fields).teaches is teaches


def test_the_default_weight_of_a_task_is_1() -> None:
    weighted = replace(PLAIN, weights={"trec": 2})
    assert [weighted.factor(task) for task in ("trec", "subj")] == [2, 1]
    assert PLAIN.factor("trec") == 1
