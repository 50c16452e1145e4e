"""Oracle: the same inner products of whole tensors in float64."""

from __future__ import annotations

import torch

from epmq_cli.merge.gram import as_rows, combination, cosines, gram, row_grams


def test_inner_products_of_several_chunks() -> None:
    models = [torch.randn(3, 50_000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    wide = torch.stack([model.flatten().double() for model in models])
    torch.testing.assert_close(gram(models), wide @ wide.T, rtol=1e-12, atol=1e-9)
    stacked = torch.stack(models).double()
    rows = torch.einsum("irc,jrc->rij", stacked, stacked)
    torch.testing.assert_close(row_grams(models), rows, rtol=1e-12, atol=1e-9)
    narrow = models[0].view(-1, 2)
    assert row_grams([narrow, narrow]).shape == (75_000, 2, 2)


def test_shapes_and_zero_vectors() -> None:
    assert [as_rows(torch.zeros(shape)).shape for shape in ((), (3,), (3, 2), (3, 2, 5))] == [
        (1, 1),
        (1, 3),
        (3, 2),
        (3, 10),
    ]
    assert gram([torch.zeros(()), torch.ones(())]).tolist() == [[0, 0], [0, 1]]
    assert cosines(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [0.0, 1.0, 0.5]
    one = torch.ones(2)
    assert combination([2.0, 3.0], [one, one]).tolist() == [5.0, 5.0]
    assert one.tolist() == [1.0, 1.0]
