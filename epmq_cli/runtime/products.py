"""Matrix products in float32, by the faster of the libraries that torch has for them on the CPU.

Torch gives these products to MKL, which leaves AVX-512 unused on processors by AMD; oneDNN is twice as fast there.
Torch takes oneDNN if it is told that bfloat16 would do ("medium"). oneDNN computes in float32 nevertheless, except on
processors with units for matrices in bfloat16, which a product shows. Torch's attention calls oneDNN once for each
tile, which takes up to twenty times as long as MKL, so oneDNN is chosen for single products, not for a whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch

PROCESSOR = Path("/proc/cpuinfo")
ERROR = 1e-5
"""The largest relative error of a product in float32; one in bfloat16 has 2e-3."""
_devices = {"cuda"}
"""The device type of this process's work: on GPUs "medium" would mean TF32."""


def exact_products(device: torch.device) -> None:
    """Prepares this process for products on a device: on GPUs never in TF32. Torch computes only convolutions in it by
    default."""
    torch.backends.cudnn.allow_tf32 = False
    _devices.clear()
    _devices.add(device.type)


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside the context, products in float32 on the CPU are as fast as torch can make them; attention is slower."""
    with _through_onednn() if _devices == {"cpu"} and _onednn_is_faster() else nullcontext():
        yield


@contextmanager
def _through_onednn() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN has faster instructions than MKL on this processor, and computes in float32."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not PROCESSOR.is_file():
        return False
    return "AuthenticAMD" in PROCESSOR.read_text(encoding="utf-8") and _error() < ERROR


def _error() -> float:
    """The relative error of a product for which torch may take oneDNN."""
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    with _through_onednn():
        found = (rows @ rows.T).double()
    products = rows.double() @ rows.double().T
    return float((found - products).norm() / products.norm())
