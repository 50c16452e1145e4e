"""Fixtures of the families' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.minihub import Hub, build


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The miniature hub of a kind, built on first use."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = build(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get
