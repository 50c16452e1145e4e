"""What `epmq inspect` says of one path, as JSON: tables.py prints it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from epmq_cli.errors import EpmqError
from epmq_cli.inspection.opened import Opened
from epmq_cli.inspection.packed import checkpoint_content
from epmq_cli.inspection.roles import HEAD, LEFT, MERGED, NUMBER, PARTS, QUANTIZED, TREATMENTS, Roles, roles_of
from epmq_cli.models.headers import TensorInfo

SHOWN = 8  # names per list


def content_of(opened: Opened) -> dict[str, Any]:
    """The content of one path."""
    content: dict[str, Any] = {"path": opened.source, "kind": opened.kind, **totals(opened.infos.values())}
    if opened.kind == "adapter":
        return content | adapter_content(opened)
    if opened.kind == "checkpoint":
        content |= checkpoint_content(opened)
        if content["format"] != "dense":
            return content
    content |= {key: opened.config.get(key) for key in ("model_type", "architectures")}
    if opened.kind == "tensors":
        return content
    try:
        family, roles = roles_of(opened.config, opened.infos, opened.path or Path(opened.source))
    except EpmqError as error:
        return content | {"family": None, "refused": [str(error)]}
    return content | {"family": family, **roles_content(opened.infos, roles), "refused": []}


def totals(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """The number of tensors and elements, bytes, bits of an element, and elements by type."""
    infos = list(infos)
    types: Counter[str] = Counter()
    for info in infos:
        types[info.dtype] += info.elements
    elements, size = sum(info.elements for info in infos), sum(info.size for info in infos)
    bits = 8 * size / elements if elements else 0.0
    return {
        "tensors": len(infos),
        "parameters": elements,
        "bytes": size,
        "bits_per_weight": round(bits, 3),
        "types": dict(types.most_common()),
    }


def roles_content(infos: Mapping[str, TensorInfo], roles: Roles) -> dict[str, Any]:
    """The totals by part and treatment, and the names of the tensors that are left, with * for layers."""
    groups: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
    for name, role in roles.items():
        groups[role].append(infos[name])
    ordered = sorted(groups, key=lambda role: (PARTS.index(role[0]), TREATMENTS.index(role[1])))
    parts = [{"part": part, "treatment": kind, **totals(groups[part, kind])} for part, kind in ordered]
    sums = {kind: sum(row["parameters"] for row in parts if row["treatment"] == kind) for kind in TREATMENTS}
    left = [name for name, (_, kind) in roles.items() if kind == LEFT]
    patterns = sorted({NUMBER.sub("*", name) for name in left})
    return {
        "parts": parts,
        "quantized": sums[QUANTIZED],
        "merged": sums[QUANTIZED] + sums[MERGED],
        "task_heads": sums[HEAD],
        "left": sums[LEFT],
        "left_names": patterns[:SHOWN],
        "left_more": len(patterns[SHOWN:]),
    }


def adapter_content(opened: Opened) -> dict[str, Any]:
    """The kind, ranks and targets of an adapter, and what a run would refuse of it."""
    from epmq_cli.models.lora.config import read_config
    from epmq_cli.models.lora.files import EXPERTS_MODULE, sorted_file
    from epmq_cli.models.lora.shapes import LowRank

    assert opened.path is not None
    values = opened.config
    content = {
        "base": values.get("base_model_name_or_path"),
        "peft_type": values.get("peft_type"),
        "alpha": values.get("lora_alpha"),
        "rslora": bool(values.get("use_rslora")),
        "dora": bool(values.get("use_dora")),
    }
    try:
        config = read_config(opened.path, "adapter")
        files = sorted_file(opened.path, "adapter", opened.infos)
    except EpmqError as error:
        return content | {"refused": [str(error)]}
    ranks: Counter[int] = Counter()
    targets: Counter[str] = Counter()
    for module, parts in files.parts.items():
        shapes = {part: opened.infos[stored].shape for part, stored in parts.items()}
        if not EXPERTS_MODULE.fullmatch(module):  # the ranks of all experts of a block, whose number the base has
            ranks[LowRank(shapes, config.is_set("fan_in_fan_out")).rank] += 1
        targets[module.removesuffix(".base_layer").rpartition(".")[2]] += 1
    return content | {
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "targets": dict(sorted(targets.items())),
        "whole_tensors": sorted(files.whole)[:SHOWN],
        "token_rows": sorted(files.rows),
        "refused": [],
    }
