"""Oracle: the loop in plain torch, bit for bit; for that loop itself, the loss that GPTQ ends with
(test_scale_search.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epmq_cli.quantize.formats.format import Grid, range_of
from epmq_cli.quantize.formats.fp8 import Fp8Format
from epmq_cli.quantize.formats.int import IntFormat
from epmq_cli.quantize.gptq import inverse_factor, quantize_columns
from epmq_cli.quantize.kernels.numba import NumbaKernel
from epmq_cli.quantize.kernels.select import ColumnKernel, TorchKernel, kernel_for, triton_works
from tests.helpers.formats import ints
from tests.helpers.tiers import first

ROOT = Path(__file__).parents[3]
CASES = [
    (4, True, torch.float16, 9, 16),
    (4, False, torch.bfloat16, 130, 33),
    (3, True, torch.bfloat16, 5, 64),
    (2, False, torch.float32, 17, 8),
    (8, True, torch.float16, 1, 20),
]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with a row of zeros, and the factor U of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator).double() / columns**0.5
    X = torch.randn(3 * columns, columns, generator=generator).double() @ mixed
    found = inverse_factor(X.T @ X, 0.01)
    assert found is not None
    W = torch.randn(rows, columns, generator=generator)
    W[rows // 2] = 0
    return W, found[0].float()


def compare(
    columns: ColumnKernel, bits: int, symmetric: bool, dtype: torch.dtype, rows: int, width: int, device: str = "cpu"
) -> None:
    """Asserts that losses of many grids, integers and errors on a device are those of plain torch on the CPU."""
    W, U = problem(rows, width)
    format, reference = ints(bits, width, symmetric), TorchKernel()
    low, high = range_of(W, format)
    shrinks = torch.linspace(1, 0.2, 7)[:, None]
    grids = format.span(shrinks * low, shrinks * high, dtype)
    grids = Grid(grids.scale * (1 - 2 * (torch.arange(7)[:, None] % 2) * symmetric), grids.zero)
    there = W.to(device), U.to(device)
    losses = columns.loss(*there, _on(device, grids), format)
    assert losses.device.type == torch.device(device).type
    assert torch.equal(losses.cpu(), reference.loss(W, U, grids, format))
    for index in (0, 1):
        grid = Grid(grids.scale[index], None if grids.zero is None else grids.zero[index]).over_columns()
        found = columns.quantize(*there, _on(device, grid), format)
        for one, other in zip(found, reference.quantize(W, U, grid, format), strict=True):
            assert torch.equal(one.cpu(), other)


def _on(device: str, grid: Grid) -> Grid:
    return Grid(grid.scale.to(device), None if grid.zero is None else grid.zero.to(device))


@pytest.mark.parametrize(("bits", "symmetric", "dtype", "rows", "width"), CASES)
def test_numba_equals_torch_bit_for_bit(bits: int, symmetric: bool, dtype: torch.dtype, rows: int, width: int) -> None:
    compare(NumbaKernel(), bits, symmetric, dtype, rows, width)


def test_numba_equals_torch_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    compare(NumbaKernel(), 4, True, torch.float16, 300, 16)


@pytest.mark.slow
def test_triton_equals_torch_bit_for_bit() -> None:
    """In Triton's interpreter, which must be enabled before Triton is imported."""
    pytest.importorskip("triton", reason="this build of torch comes without Triton")
    code = (
        "from tests.quantize.kernels.test_select import CASES, compare\n"
        "from epmq_cli.quantize.kernels.triton import TritonKernel\n"
        "for bits, symmetric, dtype, _, width in CASES:\n"
        "    compare(TritonKernel(), bits, symmetric, dtype, 3, min(width, 20))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("capability", first(1, [90, 80]))
@pytest.mark.parametrize("width", first(1, [128, 64, 512]))
def test_triton_compiles_for_gpus_without_fused_operations(
    width: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling needs no GPU. Oracle: fused multiply-adds and inexact divisions have their own names in PTX."""
    triton = pytest.importorskip("triton", reason="this build of torch comes without Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from epmq_cli.quantize.kernels import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    inputs, sizes = ("W", "U", "scale", "zero"), ("rows", "width", "low", "high")
    for kernel, weights, outputs in (
        (kernels._walk, kernels.WALKED, ("values", "errors")),
        (kernels._loss, kernels.SEARCHED, ("total",)),
    ):
        tile = dict(zip("RC", kernels._tile(width, weights), strict=True))
        kinds = dict.fromkeys((*inputs, *outputs), "*fp32") | dict.fromkeys(sizes, "i32")
        source = ASTSource(kernel, kinds | dict.fromkeys(tile, "constexpr"), tile)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False})
        assert made.asm["cubin"]
        assert {name for name in ("fma.", "div.full.", "div.approx.", "rcp.") if name in made.asm["ptx"]} == set()
        assert "div.rn.f32" in made.asm["ptx"]


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize(("group_size", "block_size"), [(16, 128), (16, 7), (-1, 10), (48, 20)])
def test_whole_weights_are_equal(search: str, group_size: int, block_size: int) -> None:
    W, U = problem(20, 48)
    groups = torch.arange(48) // (group_size if group_size > 0 else 48)
    options = (ints(4, group_size), search, torch.float16, block_size, groups)
    one, other = (quantize_columns(W, U, *options, columns) for columns in (NumbaKernel(), TorchKernel()))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1].scale, other[1].scale)
    assert one[1].zero is None


def test_each_type_and_format_has_its_kernel() -> None:
    assert isinstance(kernel_for(torch.zeros(2, 2), ints(4, -1)), NumbaKernel)
    assert isinstance(kernel_for(torch.zeros(2, 2, dtype=torch.float64), ints(4, -1)), TorchKernel)
    assert isinstance(kernel_for(torch.zeros(2, 2), Fp8Format(-1)), TorchKernel)
    assert isinstance(kernel_for(torch.zeros(2, 2), IntFormat(4, -1, "real")), TorchKernel)


def test_plain_torch_is_used_if_triton_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example for tensors on the CPU."""
    pytest.importorskip("triton", reason="this build of torch comes without Triton")
    triton_works.cache_clear()
    assert not triton_works(torch.device("cpu"))
    assert "Triton cannot build kernels here (" in caplog.text
    triton_works.cache_clear()
    monkeypatch.setattr("epmq_cli.quantize.kernels.select.find_spec", lambda name: None)
    assert not triton_works(torch.device("cpu"))
    triton_works.cache_clear()


def test_weights_stay_unchanged() -> None:
    W, U = problem(9, 16)
    kept, format = W.clone(), ints(4, 16)
    for columns in (NumbaKernel(), TorchKernel()):
        columns.quantize(W, U, Grid(torch.ones(9, 1), torch.zeros(9, 1)), format)
        columns.loss(W, U, Grid(torch.ones(2, 9), torch.zeros(2, 9)), format)
        assert torch.equal(W, kept)
