"""Oracles: torch.optim.Muon, which computes in bfloat16, and the singular vectors."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.refine.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    one, other = start.clone(), start.clone()
    ours = Muon([one], lr=0.1)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")  # type: ignore[arg-type]
    for _ in range(4):
        one.grad = torch.randn(shape, generator=generator)
        other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(one - start, other - start, rtol=0.05, atol=0.01)


def test_singular_values_become_about_one() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    own_u, own_s, own_v = torch.linalg.svd(orthogonalized(matrix), full_matrices=False)
    assert 0.6 < float(own_s.min()) <= float(own_s.max()) < 1.3
    torch.testing.assert_close(u @ v, own_u @ own_v, rtol=1e-3, atol=1e-4)
    assert not orthogonalized(torch.zeros(3, 4)).any()
