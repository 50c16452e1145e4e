"""Oracles: a plain column-by-column reference, RTN for a diagonal H, exhaustive search, and invariants."""

import itertools

import pytest
import torch
from torch import Tensor

from epmq_cli.errors import ConfigError
from epmq_cli.quantize.formats.format import NumberFormat, group_columns
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.gptq import Gptq, column_order, gptq, inverse_factor
from epmq_cli.quantize.rtn import rtn
from tests.helpers.formats import ints
from tests.helpers.tiers import every, slow


def problem(rows: int = 6, columns: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5 * columns, columns, generator=generator, dtype=torch.float64)
    mixed = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), mixed.T @ mixed


def loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    return float(torch.trace((Q - W) @ H @ (Q - W).T))


def reference(W: Tensor, H: Tensor, format: NumberFormat, search: str, damping: float, act_order: bool) -> Tensor:
    """Optimal brain quantization in a fixed order: inverts the remaining part of H after each column."""
    size = group_columns(format, len(H))
    groups = [range(start, start + size) for start in range(0, len(H), size)]
    if act_order:
        groups = sorted(groups, key=lambda group: -sum(float(H[i, i]) for i in group) / size)
    order = [i for group in groups for i in (sorted(group, key=lambda i: -float(H[i, i])) if act_order else group)]
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    W, out, grids = W.clone(), torch.empty_like(W), {}
    for position, column in enumerate(order):
        group = column // size
        if group not in grids:
            current = W[:, group * size : (group + 1) * size]
            grids[group] = format.fit(current, search, torch.float64)
        rounded = format.decode(format.encode(W[:, column], grids[group]), grids[group])
        left = order[position:]
        inverse = torch.linalg.inv(H[left][:, left])
        error = (W[:, column] - rounded) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        out[:, column] = rounded
    return out


KINDS = ("symmetric", "asymmetric", "fp8")
SIZES = ((-1, 3), (-1, 128), (4, 128), (4, 2), (4, 3), (2, 5), (8, 6))


@pytest.mark.parametrize(
    ("kind", "act_order", "group_size", "block_size"),
    every(2, ((kind, act_order, *sizes) for act_order in (False, True) for kind in KINDS for sizes in SIZES)),
)
def test_gptq_is_the_plain_column_by_column_loop(kind: str, act_order: bool, group_size: int, block_size: int) -> None:
    W, H = problem()
    spec = (Fp8Format(group_size) if kind == "fp8" else ints(4, group_size, kind == "symmetric"), "mse")
    found = gptq(W, H, *spec, torch.float64, damping=0.01, block_size=block_size, act_order=act_order)
    torch.testing.assert_close(
        found.weight.dequantize(), reference(W, H, *spec, 0.01, act_order), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", [ints(3, 4), ints(3, 4, False), Fp8Format(4), Fp8Format(-1)], ids=repr)
def test_gptq_with_a_diagonal_hessian_is_rtn(format: NumberFormat, act_order: bool) -> None:
    W, _ = problem()
    H = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    found = gptq(W, H, format, "mse", torch.float64, 0.01, 128, act_order)
    assert torch.equal(found.weight.codes.float(), rtn(W, format, "mse", torch.float64).codes.float())


def test_gptq_never_beats_the_best_of_all_roundings_and_is_nearer_to_it_than_rtn() -> None:
    spec = (ints(2, -1, True), "minmax")
    gptq_total = rtn_total = best_total = 0.0
    for seed in range(8):
        W, H = problem(rows=1, columns=5, seed=seed)
        found = gptq(W, H, *spec, torch.float64, 1e-6, 128, False).weight
        levels = [found.grid.scale.item() * value for value in range(-2, 2)]
        every = torch.tensor(list(itertools.product(levels, repeat=5)), dtype=torch.float64) - W
        best = float(((every @ H) * every).sum(1).min())
        assert loss(W, found.dequantize(), H) >= best * (1 - 1e-12)
        best_total += best
        gptq_total += loss(W, found.dequantize(), H)
        rtn_total += loss(W, rtn(W, *spec, torch.float64).dequantize(), H)
    assert gptq_total - best_total < 0.75 * (rtn_total - best_total)


def test_gptq_beats_rtn_on_average() -> None:
    spec = (ints(3, 16, True), "mse")
    ratios = []
    for seed in range(5):
        W, H = problem(16, 32, seed)
        found = gptq(W, H, *spec, torch.float64, 0.01, 128, False).weight.dequantize()
        ratios.append(loss(W, found, H) / loss(W, rtn(W, *spec, torch.float64).dequantize(), H))
    assert sum(ratios) / 5 < 0.7


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, H = problem()
    found = inverse_factor(H, 0.0)
    assert found is not None
    torch.testing.assert_close(found[0], torch.linalg.cholesky(torch.linalg.inv(H), upper=True))


def test_inputs_are_not_changed() -> None:
    W, H = problem()
    before = W.clone(), H.clone()
    gptq(W, H, ints(4, 4, True), "mse", torch.float64, 0.01, 128, True)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


@pytest.mark.parametrize(
    ("group_size", "search"), [(-1, "mse"), slow((-1, "hessian")), slow((4, "mse")), (4, "hessian")]
)
def test_act_order_beats_the_natural_order_on_average(group_size: int, search: str) -> None:
    spec, ratios = (ints(3, group_size, True), search), []
    for seed in range(8):
        W, H = problem(16, 32, seed)
        spread = torch.logspace(-1, 1, 32, dtype=torch.float64)
        H = H * spread * spread[:, None]  # the most important columns come last
        lost = [
            loss(W, gptq(W, H, *spec, torch.float64, 0.001, 128, act_order).weight.dequantize(), H)
            for act_order in (True, False)
        ]
        ratios.append(lost[0] / lost[1])
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_act_order_quantizes_whole_groups_with_the_largest_first(group_size: int) -> None:
    _, H = problem()
    order = column_order(H, group_size, act_order=True)
    assert sorted(order.tolist()) == list(range(8))
    groups = (order // group_size).reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()
    diagonal = H.diagonal()[order].reshape(-1, group_size)
    assert (diagonal.diff(dim=1) <= 0).all()
    assert (diagonal.mean(1).diff() <= 0).all()


@pytest.mark.parametrize("search", ["mse", "hessian"])
def test_act_order_is_the_natural_order_for_sorted_columns(search: str) -> None:
    W, H = problem()
    order = torch.argsort(H.diagonal(), descending=True)
    spec = (ints(3, 4, True), search)
    found, plain = (gptq(W, H[order][:, order], *spec, torch.float64, 0.01, 128, o).weight for o in (True, False))
    assert torch.equal(found.dequantize(), plain.dequantize())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_dead_columns_do_not_affect_the_scales(scale: float, act_order: bool) -> None:
    W, H = problem(16, 8)
    H[2:6], H[:, 2:6] = 0, 0
    live = [0, 1, 6, 7]
    spec = (ints(3, -1, True), "hessian")
    found = gptq(W, scale * H, *spec, torch.float64, 1e-9, 128, act_order).weight.dequantize()
    alone = gptq(W[:, live], H[live][:, live], *spec, torch.float64, 1e-9, 128, act_order).weight.dequantize()
    lost = [loss(W[:, live], Q, H[live][:, live]) for Q in (found[:, live], alone)]
    assert lost[0] < 1.05 * lost[1]  # candidates span the range of all columns, so the scales are only close


def test_a_hessian_of_zeros_is_rtn() -> None:
    W, H = problem()
    spec = (ints(4, 4, True), "mse")
    found = gptq(W, 0 * H, *spec, torch.float64, 0.01, 128, True)
    assert found.fallback is None
    assert torch.equal(found.weight.dequantize(), rtn(W, *spec, torch.float64).dequantize())


def test_a_dead_column_is_rounded_to_nearest() -> None:
    W, H = problem()
    H[3], H[:, 3] = 0, 0
    spec = (ints(4, -1, True), "mse")
    found = gptq(W, H, *spec, torch.float64, 0.01, 128, True).weight
    assert torch.equal(found.codes[:, 3], rtn(W, *spec, torch.float64).codes[:, 3])


def test_a_hessian_of_rank_one_is_quantized_with_damping() -> None:
    W, _ = problem()
    direction = torch.arange(1.0, 9.0, dtype=torch.float64)
    H = torch.outer(direction, direction)
    outcome = gptq(W, H, ints(4, -1, True), "mse", torch.float64, 0.01, 128, False)
    assert outcome.fallback is None
    assert outcome.damping == 0.01
    assert torch.isfinite(outcome.weight.dequantize()).all()


def test_a_hessian_that_stays_singular_falls_back_to_rtn() -> None:
    W, H = problem()
    spec = (ints(4, 4, True), "mse")
    outcome = gptq(W, -H, *spec, torch.float64, 0.01, 128, False)
    assert outcome.fallback == "rtn"
    assert torch.equal(outcome.weight.dequantize(), rtn(W, *spec, torch.float64).dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": 0}, r"quant.damping must be a number in \(0, 1\], got 0"),
        ({"damping": "much"}, "quant.damping"),
        ({"block_size": 0}, "quant.block_size"),
        ({"block_size": 1.5}, "quant.block_size must be a whole number"),
        ({"act_order": 2}, "quant.act_order"),
        ({"grid": "best"}, "quant.grid must be one of minmax, mse, hessian, got 'best'"),
    ],
)
def test_bad_options_are_refused(change: dict[str, object], message: str) -> None:
    good = {
        "format": ints(4, 64),
        "grid": "mse",
        "damping": 0.01,
        "block_size": 128,
        "act_order": False,
    }
    Gptq(**good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        Gptq(**{**good, **change})  # type: ignore[arg-type]
