"""Merges with FusionBench's own classes, in FusionBench's environment, for benchmarks/merges.py.

    python fusion_bench_side.py --base DIR --experts DIR DIR --out DIR --method NAME --options JSON

Folders are transformers models with a model.safetensors. The options are the arguments of FusionBench's class; `seed`
is torch's. The script writes model.safetensors to OUT and prints {"seconds": ..., "peak_bytes": ...} in one line: the
time from reading to writing, without imports, and the growth of the process's memory, without pages of files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from fusion_bench import BaseModelPool
from fusion_bench.method import (
    DareTaskArithmetic,
    DareTiesMerging,
    ISO_C_Merge,
    ISO_CTS_Merge,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TiesMergingAlgorithm,
    WUDIMerging,
)
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.singular_value_calibration import SingularValueCalibration
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from safetensors import safe_open
from safetensors.torch import save_file
from side import Watch, run
from torch import Tensor, nn

CLASSES: dict[str, Callable[..., Any]] = {
    "average": SimpleAverageAlgorithm,
    "task_arithmetic": TaskArithmeticAlgorithm,
    "ties": TiesMergingAlgorithm,
    "tsv_m": TaskSingularVectorMerging,
    "iso_c": ISO_C_Merge,
    "iso_cts": ISO_CTS_Merge,
    "wudi": WUDIMerging,
    "dare_linear": DareTaskArithmetic,
    "dare_ties": DareTiesMerging,
    "magmax": MagMaxAlgorithm,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scaling_factor": 0.3},
    "ties": {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
    "tsv_m": {"alpha": 1.0},
    "iso_c": {"scaling_factor": 1.0},
    "iso_cts": {"scaling_factor": 1.0, "common_space_fraction": 0.8},
    "wudi": {"iter_num": 300},
    "dare_linear": {"scaling_factor": 0.3, "sparsity_ratio": 0.5, "only_on_linear_weights": False},
    "dare_ties": {
        "scaling_factor": 0.5,
        "sparsity_ratio": 0.5,
        "only_on_linear_weights": False,
        "rescale": True,
        "threshold": 20,
        "remove_keys": [],
        "merge_func": "sum",
    },
    "magmax": {"scaling_factor": 0.5},
    "consensus_ta": {"scaling_factor": 0.3, "tall_mask_lambda": 0.4, "prun_thre_k": 2},
    "consensus_ties": {"scaling_factor": 0.3, "tall_mask_lambda": 0.4, "prun_thre_k": 2, "threshold": 20},
    "svc": {"scaling_factor": 0.3, "alpha": 0.1},
}
"""Arguments by method. `svc` is singular value calibration after Task Arithmetic."""
ABSENT = ("breadcrumbs", "pcb", "lines", "ace", "localize_and_stitch")
"""Methods that fusion-bench 0.2.33 does not have."""


def model(folder: Path) -> nn.Module:
    """The model of a folder, of its own class, in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    loaded: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)
    return loaded


def merge(method: str, models: dict[str, nn.Module], options: dict[str, Any]) -> nn.Module:
    """The merged model; `models` are the experts, and the base as `_pretrained_`."""
    if method.startswith("consensus"):
        return consensus(method, models, **options)
    if method == "svc":
        pool = BaseModelPool(deepcopy(models))  # the merge changes the base in place
        plain = TaskArithmeticAlgorithm(scaling_factor=options["scaling_factor"]).run(pool)
        pool = BaseModelPool({**models, "_merged_": plain})
        return SingularValueCalibration(alpha=options["alpha"], accelerator="cpu").run(pool)
    return CLASSES[method](**options).run(BaseModelPool(dict(models)))


def consensus(
    method: str,
    models: dict[str, nn.Module],
    scaling_factor: float,
    tall_mask_lambda: float,
    prun_thre_k: int,
    threshold: float | None = None,
) -> nn.Module:
    """FusionBench's masks and TIES. It reads the masks' consensus from files only, so they are counted here."""
    base = models["_pretrained_"]
    flat = {name: flattened(model) for name, model in models.items()}
    origin = flat.pop("_pretrained_")
    vectors = torch.stack([expert - origin for expert in flat.values()])
    if method == "consensus_ta":
        total = vectors.sum(0)
    else:
        total = ties_merging(vectors.clone(), reset_thresh=threshold, merge_func="sum")
    masks = [
        generate_task_masks(vectors, expert, origin, total, tall_mask_lambda).flatten() for expert in flat.values()
    ]
    kept = torch.stack(masks).sum(0) >= prun_thre_k
    nn.utils.vector_to_parameters(origin + scaling_factor * kept * total, base.parameters())
    return base


def flattened(model: nn.Module) -> Tensor:
    """The parameters of a model as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def write(merged: nn.Module, base: Path, out: Path) -> None:
    """Writes the tensors of the merged model that the base's file has."""
    with safe_open(base / "model.safetensors", "pt") as file:
        names = list(file.keys())
    tensors = merged.state_dict()
    prefix = "" if names[0] in tensors else f"{merged.base_model_prefix}."
    out.mkdir(parents=True, exist_ok=True)
    content = {name: tensors[name.removeprefix(prefix)].detach().contiguous().clone() for name in names}
    save_file(content, out / "model.safetensors", {"format": "pt"})


def measured(job: dict[str, Any]) -> dict[str, float]:
    """Runs one merge and returns the measurements."""
    method, options, base, out = job["method"], dict(job["options"]), Path(job["base"]), Path(job["out"])
    if method not in DEFAULTS:
        known = "fusion-bench 0.2.33 does not have it" if method in ABSENT else "it is unknown"
        raise ValueError(f"{method}: {known}; the methods are {', '.join(DEFAULTS)}")
    torch.manual_seed(options.pop("seed", 0))
    watch = Watch()
    with contextlib.redirect_stdout(sys.stderr):  # FusionBench prints while it merges
        models = {"_pretrained_": model(base)}
        models |= {f"expert{number}": model(Path(folder)) for number, folder in enumerate(job["experts"])}
        write(merge(method, models, DEFAULTS[method] | options), base, out)
    return watch.end()


if __name__ == "__main__":
    run(measured, __doc__)
