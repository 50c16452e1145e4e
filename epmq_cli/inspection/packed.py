"""What a checkpoint of epmq holds: its format, and bits and groups of its linears by layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmq_cli.errors import EpmqError
from epmq_cli.inspection.opened import MANIFEST, RECORD, Opened
from epmq_cli.models.answers import cached_answer
from epmq_cli.models.headers import TensorInfo, read_json
from epmq_cli.store.hashing import content

CODES = (".weight_packed", ".qweight", ".weight")
"""Suffixes of the codes of a linear, by format."""
SCALES = (".weight_scale", ".scales")
LAYER = re.compile(r"^(.*?\.\d+)\.")


def checkpoint_content(opened: Opened) -> dict[str, Any]:
    """Format, formats of numbers, rows by layer, and bits of a quantized weight with scales and zero points."""
    assert opened.path is not None
    quantization = opened.config.get("quantization_config")
    record = (opened.path / RECORD).is_file()
    writer = "epmq run" if record else "epmq merge" if (opened.path / MANIFEST).is_file() else None
    described: dict[str, Any] = {
        "model_type": opened.config.get("model_type"),
        "architectures": opened.config.get("architectures"),
        "written_by": writer,
        "format": "dense" if not isinstance(quantization, dict) else quantization.get("quant_method"),
    }
    if record:
        described["run"] = _recorded(opened.path)
    if quantization is None:
        return described | {"linears": 0, "formats": [], "layers": [], "refused": []}
    names = sorted(name.removesuffix(end) for name in opened.infos for end in SCALES if name.endswith(end))
    try:
        formats = _formats(opened.path, quantization, names)
    except EpmqError as error:
        return described | {"linears": len(names), "formats": [], "layers": [], "refused": [str(error)]}
    linears = {name: _linear(opened.infos, name, formats[name]) for name in names}
    return described | {
        "linears": len(linears),
        "formats": _grouped(linears, lambda name, own: own["format"]),
        "layers": _grouped(linears, lambda name, own: _layer(name)),
        "bits_by_linear": {name: own["bits"] for name, own in linears.items()},
        "refused": [],
    }


def _recorded(folder: Path) -> dict[str, Any]:
    """The suite and the options of the run that wrote a checkpoint."""
    try:
        config = read_json(folder, RECORD, "checkpoint").get("config", {})
        return {"suite": config["suite"].get("name"), "quant": config["quant"].get("_target_", "").rpartition(".")[2]}
    except (EpmqError, KeyError, TypeError, AttributeError):
        return {}


def _formats(folder: Path, quantization: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """The number format of each quantized linear, as the checkpoint's reader understands its config. The import of the
    reader takes seconds, so its answer is cached."""

    def ask() -> dict[str, dict[str, Any]]:
        from epmq_cli.checkpoint.exporter import unfit
        from epmq_cli.checkpoint.layouts import layout_of

        layout, formats = layout_of(folder), {}
        for name in names:
            format = layout.format_of(name)
            if format is None:
                raise unfit(name)
            zero = format.zero_points
            formats[name] = {
                "format": format.name, "bits": format.bits, "group_size": format.group_size, "zero_points": zero
            }  # fmt: skip
        return formats

    readers = sorted((Path(__file__).parents[1] / "checkpoint").glob("*.py"))
    code = [content(file).sha256 for file in readers]
    formats: dict[str, dict[str, Any]] = cached_answer(
        {"formats of": quantization, "linears": names, "by": code}, ask, __file__
    )
    return formats


def _linear(infos: Mapping[str, TensorInfo], name: str, format: Mapping[str, Any]) -> dict[str, Any]:
    """The weights and stored bytes of a linear."""
    own = [stored for stored in infos if stored.startswith(f"{name}.") and not stored.endswith(".bias")]
    codes = next(infos[f"{name}{end}"] for end in CODES if f"{name}{end}" in infos)
    weights = 8 * codes.size // format["bits"]
    return {**format, "weights": weights, "bytes": sum(infos[stored].size for stored in own)}


def _layer(name: str) -> str:
    match = LAYER.match(name)
    return match[1] if match else name


def _grouped(linears: Mapping[str, Mapping[str, Any]], key: Any) -> list[dict[str, Any]]:
    """The linears by key: number, weights, bytes, bits of the codes and of a whole weight, and group sizes."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, own in linears.items():
        groups[key(name, own)].append(own)
    return [_row(name, groups[name]) for name in sorted(groups, key=_numbered)]


def _row(name: str, linears: list[Mapping[str, Any]]) -> dict[str, Any]:
    weights, size = (sum(linear[part] for linear in linears) for part in ("weights", "bytes"))
    return {
        "name": name,
        "linears": len(linears),
        "weights": weights,
        "bytes": size,
        "bits": round(sum(linear["bits"] * linear["weights"] for linear in linears) / weights, 3),
        "bits_per_weight": round(8 * size / weights, 3),
        "group_sizes": sorted({linear["group_size"] for linear in linears}),
        "zero_points": sorted({linear["zero_points"] for linear in linears}),
    }


def _numbered(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
