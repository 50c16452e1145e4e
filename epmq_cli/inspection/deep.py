"""Reads the tensors of one model: norms, largest magnitudes, NaN and infinity."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from epmq_cli.errors import EpmqError, ModelError
from epmq_cli.inspection.opened import WEIGHTS, Opened
from epmq_cli.inspection.roles import roles_of
from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.runtime.progress import track


def values_of(opened: Opened) -> dict[str, Any]:
    """The norm and the largest magnitude of each part, and the number of values that are not finite by tensor.

    Raises ModelError if the tensors are not on this machine.
    """
    if opened.path is None:
        raise ModelError(f"model: {opened.source} is not on this machine, and --deep reads the tensors; download it")
    path = opened.path / WEIGHTS if opened.kind == "adapter" else opened.path
    files = SafetensorsFiles(path, opened.kind)
    part_of = _parts(opened)
    squares, largest = defaultdict[str, float](float), defaultdict[str, float](float)
    not_finite: dict[str, int] = {}
    for name in track(list(files.infos), "read tensors"):
        tensor = files.tensor(name)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.float()
        finite = values.isfinite()
        if not finite.all():
            not_finite[name] = int((~finite).sum())
            values = values[finite]
        part = part_of.get(name, "all")
        squares[part] += float(values.double().square().sum())
        largest[part] = max(largest[part], float(values.abs().max()) if values.numel() else 0.0)
    parts = [{"part": part, "norm": squares[part] ** 0.5, "largest": largest[part]} for part in squares]
    return {"parts": parts, "not_finite": not_finite}


def _parts(opened: Opened) -> dict[str, str]:
    """Tensor -> part, if a family takes the model."""
    if opened.kind != "model":
        return {}
    try:
        _, roles = roles_of(opened.config, opened.infos, opened.path or Path(opened.source))
    except EpmqError:
        return {}
    return {name: part for name, (part, _) in roles.items()}
