"""The least time in which a device can have read so many bytes and done so many operations, by its data sheet.

Sources, NVIDIA's data sheets: https://www.nvidia.com/en-us/data-center/h200/ and .../h100/ (SXM), .../a100/ (SXM,
80 GB); TF32 on tensor cores at half the rate with sparsity. Devices are known by the exact names that torch gives:
other variants (PCIe, NVL, 40 GB, parts of a GPU by MIG) have other rates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of a device: `bandwidth` of its memory in bytes a second; operations a second in `float32` outside the tensor
    cores, in which epmq makes its products, and in `tf32` on them, which it leaves to the user's own setting."""

    bandwidth: float
    float32: float
    tf32: float


RATES = {
    "NVIDIA H200": Rates(4.8e12, 67e12, 494e12),
    "NVIDIA H100 80GB HBM3": Rates(3.35e12, 67e12, 494e12),
    "NVIDIA A100-SXM4-80GB": Rates(2.039e12, 19.5e12, 156e12),
}


def floors(device: str, processes: int, operations: float, read: float) -> list[str]:
    """Seconds for the operations in float32 and in TF32 and for the bytes, shared out among as many devices; nothing
    for a device whose rates are not known."""
    if device not in RATES:
        return []
    rates = RATES[device]
    seconds = (operations / rates.float32, operations / rates.tf32, read / rates.bandwidth)
    return [f"{value / processes:.3f}" for value in seconds]
