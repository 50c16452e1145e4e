"""Oracles: torch's own KL divergence in float64, and the definition over merged classes."""

from __future__ import annotations

import pytest
import torch

from epmq_cli.refine.soft_labels import Outputs, SoftLabels

GENERATOR = torch.Generator().manual_seed(0)
EXPERT, STUDENT = (torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64) * 3 for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_give_the_divergence(temperature: float) -> None:
    labels = SoftLabels.of(Outputs(EXPERT, None), temperature, None)
    p, log_q = (EXPERT / temperature).softmax(-1), (STUDENT / temperature).log_softmax(-1)
    wanted = temperature**2 * torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    torch.testing.assert_close(labels.divergence(STUDENT, temperature), wanted)
    torch.testing.assert_close(labels.divergence(EXPERT, temperature), torch.zeros(5, dtype=torch.float64))


def test_classes_that_are_not_kept_count_as_one() -> None:
    labels = SoftLabels.of(Outputs(EXPERT, None), 2.0, 3)
    wanted = []
    for expert, student in zip(EXPERT, STUDENT, strict=True):
        p, q = (expert / 2).softmax(0), (student / 2).softmax(0)
        top = p.argsort(descending=True)[:3]
        p, q = (torch.cat([x[top], 1 - x[top].sum().view(1)]) for x in (p, q))
        wanted.append(4 * (p * (p / q).log()).sum())
    torch.testing.assert_close(labels.divergence(STUDENT, 2.0), torch.stack(wanted))


def test_few_kept_classes_have_finite_gradients_where_they_are_certain() -> None:
    sure = torch.tensor([[50.0, 0.0, 0.0]])
    labels = SoftLabels.of(Outputs(sure, None), 1.0, 1)
    logits = torch.tensor([[-50.0, 0.0, 0.0]], requires_grad=True)
    loss = labels.divergence(logits, 1.0).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(50, rel=0.02)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_one_logit_is_a_number() -> None:
    labels = SoftLabels.of(Outputs(EXPERT[:, :1], None), 2.0, None)
    torch.testing.assert_close(labels.divergence(STUDENT[:, :1], 2.0), (STUDENT - EXPERT)[:, 0] ** 2 / 2)


def test_parts_and_rows() -> None:
    whole = SoftLabels.of(Outputs(EXPERT, STUDENT), 2.0, 3)
    parts = [SoftLabels.of(Outputs(EXPERT[rows], STUDENT[rows]), 2.0, 3) for rows in (slice(0, 2), slice(2, 5))]
    joined = SoftLabels.joined(parts)
    for name in ("kept", "classes", "features"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
        assert torch.equal(getattr(joined.rows(slice(2, 5)), name), getattr(parts[1], name))
    torch.testing.assert_close(whole.squared_error(EXPERT), ((EXPERT - STUDENT) ** 2).sum(1))
