"""Gives every Python process with this folder on PYTHONPATH two simulated GPUs: those of device.cpp, as CUDA devices.

They reveal errors of GPU runs on machines without a GPU: tensors of two devices in one operation, code for CUDA only,
out of memory, and one device per process. They do not cover timing, the kernels of CUDA and Triton, or NCCL.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

TOTAL = 1 << 36  # reported memory in bytes
SOURCE = Path(__file__).with_name("device.cpp")
BUILT = SOURCE.parents[2] / "build" / f"standin-{torch.__version__}.so"


def build() -> None:
    """Compiles the stand-in for this version of torch, unless it exists."""
    if BUILT.is_file() and BUILT.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    BUILT.parent.mkdir(exist_ok=True)
    home = Path(torch.__file__).parent
    headers = (f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}")
    libraries = (f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu")
    with TemporaryDirectory(dir=BUILT.parent) as folder:
        made = Path(folder) / BUILT.name
        options = ("-shared", "-fPIC", "-std=c++20", "-O1", *headers)
        run(["c++", *options, str(SOURCE), "-o", str(made), *libraries], check=True)
        made.replace(BUILT)


def pretend() -> None:
    """Makes the functions of torch.cuda report the stand-in as a GPU."""
    device: Any = torch.ops.standin
    device.set_limit(TOTAL)
    said = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 2,
        "get_device_name": "stand-in",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(total_memory=TOTAL, name="stand-in", major=9, minor=0),
    }
    done = ("init", "_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all")
    for name, value in {**said, **dict.fromkeys(done)}.items():
        setattr(torch.cuda, name, lambda *ignored, value=value: value)
    for name in ("memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, lambda *ignored: device.used())
    torch.cuda.set_device = lambda number: device.set_device(torch.device("cuda", torch.device(number).index or 0))
    torch.cuda.current_device = lambda: device.current_device()
    torch.cuda.max_memory_allocated = lambda *ignored: device.peak()
    torch.cuda.reset_peak_memory_stats = lambda *ignored: device.forget_peak()
    torch.cuda.set_per_process_memory_fraction = lambda part, *ignored: device.set_limit(int(TOTAL * part))


def patch_torch() -> None:
    """Resizes storages of the stand-in, which torch does itself only for CUDA, and lets gloo replace NCCL."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        return torch.ops.standin.resize(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size)

    def joined(backend: str, **options: Any) -> None:
        join(backend.replace("nccl", "gloo"), **options)

    def shared(collective: Any) -> Any:
        return lambda tensor, *args, **options: collective(
            torch.ops.standin.host(tensor) if tensor.is_cuda else tensor, *args, **options
        )

    join, distributed.init_process_group = distributed.init_process_group, joined
    for name in ("all_reduce", "broadcast", "reduce"):
        setattr(distributed, name, shared(getattr(distributed, name)))
    torch.UntypedStorage.resize_ = resized


def packed(pairs: Tensor, tiles: int) -> Tensor:
    """Stands for CUDA's order of four-bit integers; only the shape is the same."""
    rows, columns = pairs.shape[0], pairs.shape[1] * 2
    if pairs.dtype != torch.uint8 or rows % 8 or columns % (16 * tiles) or tiles not in (2, 4, 8):
        raise RuntimeError(f"CUDA would not pack {pairs.dtype} {tuple(pairs.shape)} in {tiles} tiles")
    return pairs.reshape(-1).view(torch.int32).reshape(rows // 8, columns // (16 * tiles), 32, tiles // 2)


def multiplied(x: Tensor, weight: Tensor, group: int, scales: Tensor) -> Tensor:
    """x (rows, in) times the result of `packed`, with (in / group, out, 2) scales and zeros."""
    rows, columns = weight.shape[0] * 8, x.shape[1]
    if {x.dtype, scales.dtype} != {torch.bfloat16} or scales.shape != (columns // group, rows, 2):
        raise RuntimeError(f"CUDA would not multiply {x.dtype} with {scales.dtype} scales {tuple(scales.shape)}")
    pairs = weight.reshape(-1).view(torch.uint8).reshape(rows, -1)
    integers = torch.stack([pairs >> 4, pairs & 15], 2).reshape(rows, -1).float() - 8
    scale, zero = (part.T.float().repeat_interleave(group, 1) for part in scales.unbind(2))
    return (x.float() @ (integers * scale + zero).T).bfloat16()


build()
torch.ops.load_library(str(BUILT))
pretend()
patch_torch()
kernels = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a CUDA build they replace other kernels
    kernels.impl("_convert_weight_to_int4pack", packed, "CUDA")
    kernels.impl("_weight_int4pack_mm", multiplied, "CUDA")
