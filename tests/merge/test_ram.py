"""Oracles: sums and averages element by element; RAM+ on counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.merging import merged, method

BASE = {"u": torch.tensor([1.0, 1.0, 1.0, 1.0]), "v": torch.tensor([[0.0, 0.0]])}
FIRST = {"u": torch.tensor([3.0, 1.0, 2.0, 1.0]), "v": torch.tensor([[0.5, 0.0]])}
SECOND = {"u": torch.tensor([1.0, 1.0, 5.0, 1.000001]), "v": torch.tensor([[0.0, 0.25]])}
# own changes: u0 and v00 of the first, v01 of the second; shared: u2; the change of u3 is below epsilon


def test_own_changes_are_summed_and_shared_ones_averaged(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("ram"), BASE, [FIRST, SECOND])
    assert found["u"].tolist() == [3.0, 1.0, 3.5, 1.0]
    assert found["v"].tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("options", "u", "v"),
    [
        ({"scope": "tensor"}, 1 + 0.1 * 0.2, 1.0),  # u: one shared for one own; v: none
        ({"scope": "tensor", "alpha": 10}, 1 + 0.1 * 1, 1.0),
        ({"scope": "global", "alpha": 10}, 1 + 0.1 * 0.5, 1 + 0.1 * 0.5),  # one shared for two own
    ],
)
def test_ram_plus_strengthens_own_changes(options: dict[str, Any], u: float, v: float, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", method("ram", r=0.1, **options), BASE, [FIRST, SECOND])
    torch.testing.assert_close(found["u"], torch.tensor([1 + 2 * u, 1.0, 3.5, 1.0]))
    torch.testing.assert_close(found["v"][0, 0], torch.tensor(0.5 * v))
