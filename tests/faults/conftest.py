"""Uninterrupted runs, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.short import OPTIONS, Undisturbed
from tests.helpers.hubs import run_in


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The folder of a run with these options on a hub; each run is done on first use."""
    done: dict[tuple[Any, ...], Path] = {}

    def run(hub: Path, *options: str) -> Path:
        if (hub, *options) not in done:
            done[(hub, *options)] = tmp_path_factory.mktemp("whole")
            run_in(done[(hub, *options)], hub, *OPTIONS, *options)
        return done[(hub, *options)]

    return run
