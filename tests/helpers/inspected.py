"""Contents of `epmq inspect`, with few numbers."""

from __future__ import annotations

from typing import Any

from epmq_cli.inspection.content import totals
from epmq_cli.models.headers import TensorInfo


def part(name: str, treatment: str, parameters: int) -> dict[str, Any]:
    """A row of parts, of two bytes a parameter."""
    return {"part": name, "treatment": treatment, **_totals(parameters)}


def _totals(parameters: int) -> dict[str, Any]:
    return totals([TensorInfo((parameters,), "F16")])


ROLES: dict[str, Any] = {
    "parts": [part("blocks", "quantized", 6000), part("norms", "merged", 1000), part("others", "left", 3000)],
    "quantized": 6000,
    "merged": 7000,
    "left": 3000,
    "left_names": ["logit_scale"],
    "left_more": 2,
}


def model(path: str, **changes: Any) -> dict[str, Any]:
    """The content of a model."""
    found = {"path": path, "kind": "model", "family": "clip", "architectures": ["CLIPModel"], **_totals(10_000)}
    return {**found, **ROLES, "refused": [], **changes}


def checkpoint(path: str, bits: dict[str, int]) -> dict[str, Any]:
    """The content of a checkpoint with linears of so many bits."""
    row = {
        "name": "int4", "linears": len(bits), "weights": 64, "bytes": 32, "bits": 4.0, "bits_per_weight": 4.25
    } | {"group_sizes": [-1], "zero_points": ["none"]}  # fmt: skip
    found = {"kind": "checkpoint", "format": "compressed-tensors", "linears": len(bits), "written_by": "epmq run"}
    return model(path, **found, formats=[row], layers=[row], bits_by_linear=bits, parts=[])


def task_vectors(tasks: list[str], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Task vectors, each tensor with other numbers; the cosine of two experts is 0.5."""
    cosines = {one: {other: 1.0 if one == other else 0.5 for other in tasks} for one in tasks}
    shares = {"sign_conflicts": 0.25, "trimmed": dict.fromkeys(tasks, 0.7), "outvoted": dict.fromkeys(tasks, 0.1)}
    mean = 0.5 if len(tasks) > 1 else None
    total = {"base_norm": 10.0, "norms": dict.fromkeys(tasks, 0.1), "cosines": cosines, "cosine": mean, **shares}
    rows = [
        {"tensor": name, "shape": list(shape), "elements": 8, "base_norm": 10.0, "norm": 0.1 * number, "cosine": mean}
        | {"sign_conflicts": 0.1 * number, "trimmed": 0.7, "outvoted": 0.01 * number}
        for number, (name, shape) in enumerate(tensors.items(), 1)
    ]
    return {"density": 0.2, "total": total, "blocks": [], "tensors": rows}


def experts(names: list[str], vectors: dict[str, Any] | None, refused: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of experts and their base."""
    found = {"base": "models/base", "experts": {name: f"models/{name}" for name in names}, "family": "clip"}
    models = {"models": {name: _totals(10_000) for name in ("base", *names)}, "heads_of_experts": {}, "processors": {}}
    return {**found, **models, "configs": {}, **ROLES, "task_vectors": vectors, "refused": list(refused)}
