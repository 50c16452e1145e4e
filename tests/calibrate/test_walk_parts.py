"""Oracle: the parts of a walk are as many as its bar counts, and the bar ends full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epmq_cli.runtime import progress
from tests.helpers.hubs import walk


@pytest.mark.parametrize("options", [(), ("guidance=feature",), ("guidance.readout=true",)], ids=str)
def test_a_walk_finishes_all_its_parts(
    options: tuple[str, ...], clip_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters: list[progress.Meter] = []

    class Kept(progress.Meter):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            meters.append(self)

    monkeypatch.setattr(progress, "Meter", Kept)
    walk(clip_hub, *options)
    meter = next(meter for meter in meters if meter.stage == "calibrate and quantize")
    assert meter.done == meter.total == len(meter.parts)
    assert [part.work > 0 for part in meter.parts] == [False, *[True] * (meter.total - 1)]
