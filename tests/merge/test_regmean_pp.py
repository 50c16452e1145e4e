"""Oracle: RegMean, when every section has the moments of the experts. tests/calibrate/test_section_walk.py has the
moments themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.regmean import RegMean
from epmq_cli.merge.regmean_pp import RegMeanPP
from tests.helpers.merging import SHAPES, GivenData, merged, tensors

EXPERTS = [tensors(seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_with_the_same_moments_it_is_regmean(memory: int, tmp_path: Path) -> None:
    found = merged(tmp_path / "x", RegMeanPP(0.9, False), tensors(0), EXPERTS, GivenData(memory=memory))
    one_by_one = GivenData(memory=1)  # its random moments depend on what is measured together
    wanted = merged(tmp_path / "y", RegMean(0.9, False), tensors(0), EXPERTS, one_by_one)
    assert all(torch.equal(found[name], wanted[name]) for name in SHAPES)


def test_one_expert_stays_unchanged(tmp_path: Path) -> None:
    found = merged(tmp_path / "x", RegMeanPP(0.9, False), tensors(0), EXPERTS[:1])
    assert all(torch.equal(found[name], EXPERTS[0][name]) for name in SHAPES)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"merge.alpha must be a number in \[0, 1\], got 1.5"):
        RegMeanPP(1.5, False)
