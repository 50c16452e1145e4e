"""Lower bounds on the time a device needs to read a number of bytes and do a number of operations, by its data sheet.

The sources are NVIDIA's data sheets: https://www.nvidia.com/en-us/data-center/h200/ and .../h100/ (SXM), .../a100/
(SXM, 80 GB). TF32 on tensor cores is half the rate with sparsity. Devices are looked up by the exact names that torch
reports, because other variants (PCIe, NVL, 40 GB, MIG slices) have other rates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """The rates of a device.

    `bandwidth` is that of its memory, in bytes per second. `float32` is operations per second outside the tensor cores,
    where epmq computes its products. `tf32` is operations per second on the tensor cores; epmq uses TF32 only if the
    user turns it on.
    """

    bandwidth: float
    float32: float
    tf32: float


RATES = {
    "NVIDIA H200": Rates(4.8e12, 67e12, 494e12),
    "NVIDIA H100 80GB HBM3": Rates(3.35e12, 67e12, 494e12),
    "NVIDIA A100-SXM4-80GB": Rates(2.039e12, 19.5e12, 156e12),
}


def floors(device: str, processes: int, operations: float, read: float) -> list[str]:
    """Returns the seconds for the operations in float32 and in TF32 and for the bytes, with one device per process.

    The list is empty for a device whose rates are unknown.
    """
    if device not in RATES:
        return []
    rates = RATES[device]
    seconds = (operations / rates.float32, operations / rates.tf32, read / rates.bandwidth)
    return [f"{value / processes:.3f}" for value in seconds]
