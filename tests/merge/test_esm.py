"""Oracle: the steps of the paper in float64, on the outputs X dW' themselves; closed forms on a few numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.merge.esm import Esm, layer_scales, merged_subspaces, principal_directions, subspace
from tests.helpers.merging import GivenData, merged, tensors

EXPERTS = [tensors(seed) for seed in (1, 2)]


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def polar(matrix: Tensor) -> Tensor:
    """The polar factor times the mean singular value."""
    P, D, Q = torch.linalg.svd(matrix, full_matrices=False)
    return (P @ Q) * D.mean()


def reference(vectors: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """The merged task vector of linears of full rank, without the factor of the layer."""
    U, V, norms = [], [], [float(vector.norm()) for vector in vectors]
    for vector, X, norm in zip(vectors, inputs, norms, strict=True):
        k = len(vector) // len(vectors)
        _, S, Vh = torch.linalg.svd(X @ vector.T, full_matrices=False)
        e = (S[:k] ** 2 / (S[:k] ** 2).mean()) ** 0.15
        e = e / e.mean()
        U.append(Vh[:k].T * e)
        V.append((norm / (sum(norms) / len(norms))) ** 2 * e[:, None] * (Vh[:k] @ vector))
    below = torch.cat(V)
    columns = below.norm(dim=0)
    return 2 * polar(torch.cat(U, 1)) @ polar(below * (columns / columns.mean()) ** 2)


@pytest.mark.parametrize(("out", "width", "experts"), [(6, 8, 2), (12, 5, 3), (8, 8, 3)])
def test_the_merge_follows_the_papers_steps(out: int, width: int, experts: int) -> None:
    vectors = [draws(i, out, width) for i in range(experts)]
    inputs = [draws(10 + i, 40, width) for i in range(experts)]
    own = [subspace(vector, moments(X), out // experts) for vector, X in zip(vectors, inputs, strict=True)]
    kept = [vector for vector in own if vector.directions.shape[1] == out // experts]
    assert len(kept) == experts
    torch.testing.assert_close(merged_subspaces(own), reference(vectors, inputs))


@pytest.mark.parametrize(("out", "width"), [(5, 7), (7, 5)])
def test_directions_are_eigenvectors_of_the_outputs_moments(out: int, width: int) -> None:
    vector, X = draws(0, out, width), draws(1, 30, width)
    P, values = principal_directions(vector, moments(X), 3)
    torch.testing.assert_close(moments(X @ vector.T) @ P, P * values)
    torch.testing.assert_close(P.T @ P, torch.eye(3, dtype=torch.float64))
    assert values.tolist() == sorted(values.tolist(), reverse=True)


def test_directions_that_change_no_output_are_dropped() -> None:
    low = draws(0, 6, 1) @ draws(1, 1, 8)
    P, values = principal_directions(low, moments(draws(2, 30, 8)), 3)
    assert P.shape == (6, 1) and len(values) == 1
    zero = subspace(torch.zeros_like(low), moments(draws(2, 30, 8)), 3)
    one = subspace(draws(3, 6, 8), moments(draws(2, 30, 8)), 3)
    assert torch.equal(merged_subspaces([zero, zero]), torch.zeros_like(low))
    assert torch.isfinite(merged_subspaces([zero, one])).all()
    assert int(torch.linalg.matrix_rank(merged_subspaces([one, one]))) == 3  # the same directions twice


def test_layers_are_scaled_relative_to_those_of_their_kind() -> None:
    norms = {("layer.0.q", "layer.0.k"): 1.0, ("layer.1.q", "layer.1.k"): 3.0, ("layer.0.out",): 5.0}
    assert list(layer_scales(norms).values()) == [0.25, 2.25, 1.0]
    assert layer_scales({("a",): 0.0}) == {("a",): 0.0}


def test_linears_get_the_scaled_vector_and_others_the_mean_of_task_vectors(tmp_path: Path) -> None:
    X = {f"t{i}": {"a": draws(i, 20, 6), "b": draws(i + 5, 20, 4)} for i in range(2)}
    given = GivenData(moments={task: {name: moments(rows) for name, rows in own.items()} for task, own in X.items()})
    base = tensors(0)
    found = merged(tmp_path / "x", Esm(0.7), base, EXPERTS, given)
    for name in ("a", "b"):
        vectors = [(expert[f"{name}.weight"] - base[f"{name}.weight"]).double() for expert in EXPERTS]
        wanted = base[f"{name}.weight"] + 0.7 * reference(vectors, [X[task][name] for task in X])
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    for name in ("a.bias", "scalar"):
        mean = sum(expert[name] - base[name] for expert in EXPERTS) / 2
        torch.testing.assert_close(found[name], base[name] + 0.7 * mean)


def test_linears_with_fewer_outputs_than_experts_take_the_mean(tmp_path: Path) -> None:
    experts = [tensors(seed) for seed in range(1, 7)]
    found = merged(tmp_path / "x", Esm(1), tensors(0), experts)["b.weight"]
    torch.testing.assert_close(found, sum(expert["b.weight"] for expert in experts) / 6)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"merge.scale must be a number in \[0, 10\], .* got 11|merge.scale"):
        Esm(11)
