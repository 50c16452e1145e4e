"""A checkpoint of epmq run that tests can damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.hubs import run_in


@pytest.fixture(scope="module")
def made(clip_hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose checkpoint has symmetric 4-bit grids, searched by squared error."""
    folder = tmp_path_factory.mktemp("made")
    run_in(folder, clip_hub, "quant.grid=mse", "eval.stages=[quantized]", "eval.samples=20", "calib.samples=8")
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint in a copy of its run folder."""
    return Path(shutil.copytree(made, tmp_path / "run")) / "checkpoint"
