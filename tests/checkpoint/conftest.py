"""Checkpoints of the miniature hubs: 4 bits in groups of 32, as the int4 kernel requires."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.hubs import Scene, run_in
from tests.helpers.minihub import build

OPTIONS = ("group_size=32", "eval.stages=[]", "calib.samples=8")
Made = Callable[..., tuple[Path, Scene]]
"""Returns the checkpoint of a kind of model with further options, and its scene."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, clip_hub: Path, bert_hub: Path) -> Made:
    """The checkpoints are written on first use and must not be changed."""
    found: dict[tuple[str, ...], tuple[Path, Scene]] = {}
    hubs = {"clip": clip_hub, "bert": bert_hub}

    def get(kind: str, *options: str) -> tuple[Path, Scene]:
        if kind not in hubs:
            hubs[kind] = build(tmp_path_factory.mktemp("hub"), kind)
        key = (kind, *options)
        if key not in found:
            folder, given = tmp_path_factory.mktemp("run"), (*OPTIONS, *options)
            found[key] = run_in(folder, hubs[kind], *given), Scene(hubs[kind], *given)
        return found[key]

    return get
