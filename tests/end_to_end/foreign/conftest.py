"""Fixtures of the tests on users' folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.foreign.judge import REFUSED, TAKEN, Verdict
from tests.helpers.outcomes import FOREIGN

Conclude = Callable[[Verdict], None]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for models that several combinations share."""
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture
def conclude(request: pytest.FixtureRequest) -> Conclude:
    """Counts a verdict for the report, and fails unless the combination was merged correctly or refused correctly."""

    def concluded(verdict: Verdict) -> None:
        request.node.user_properties.append((FOREIGN, verdict.outcome))
        assert verdict.outcome in (TAKEN, REFUSED), f"{verdict.outcome}: {verdict.detail}"

    return concluded
