"""Opens one path for inspection: headers and JSON files only, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from epmq_cli.errors import ModelError
from epmq_cli.models.headers import PICKLES, SafetensorsHeaders, TensorInfo, check_counts, read_json
from epmq_cli.models.hub_headers import hub_headers, on_this_machine
from epmq_cli.models.other_formats import refuse_other_formats
from epmq_cli.models.stored import infos_as_linears

ADAPTER, CONFIG, RECORD, MANIFEST = "adapter_config.json", "config.json", "epmq.json", "manifest.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

Kind = Literal["model", "adapter", "checkpoint", "tensors"]
"""`checkpoint`: epmq wrote it. `tensors`: one safetensors file without a config."""


@dataclass(frozen=True)
class Opened:
    """The headers of one path. `path`: None if only the hub has it."""

    source: str
    path: Path | None
    kind: Kind
    config: dict[str, Any]
    infos: dict[str, TensorInfo]


def open_headers(source: str, role: str = "model", root: str | None = None) -> Opened:
    """The headers of a folder, a file or a hub id. Raises ModelError for pickles, damaged files and other folders."""
    found = on_this_machine(source, role, root)
    if not isinstance(found, Path):
        if found["inside"]:
            raise ModelError(
                f"{role}: {source} is not on this machine; epmq inspect reads whole repositories of the hub"
            )
        config, infos = hub_headers(found["repo"], found["revision"], role)
        return Opened(source, None, "model", config, infos)
    if found.is_file():
        return _file(source, found, role)
    if (found / ADAPTER).is_file() and not (found / CONFIG).is_file():
        return _adapter(source, found, role)
    if not (found / CONFIG).is_file() and (inside := sorted(found.glob(f"*/{ADAPTER}"))):
        names = ", ".join(str(path.parent) for path in inside)
        raise ModelError(f"{role}: {found} contains adapters in subfolders; give one of them: {names}")
    refuse_other_formats(found, role)
    config, headers = read_json(found, CONFIG, role), SafetensorsHeaders(found, role)
    check_counts(found / CONFIG, role, config, len(headers.infos))
    written = (found / RECORD).is_file() or (found / MANIFEST).is_file() or "quantization_config" in config
    return Opened(source, found, "checkpoint" if written else "model", config, infos_as_linears(config, headers.infos))


def _file(source: str, path: Path, role: str) -> Opened:
    if path.suffix in PICKLES:
        raise ModelError(
            f"{role}: {path} is a pickle, which has no header to read; give --base to inspect it as an expert of a "
            "base, which opens it with weights_only"
        )
    return Opened(source, path, "tensors", {}, SafetensorsHeaders(path, role).infos)


def _adapter(source: str, path: Path, role: str) -> Opened:
    if not (path / WEIGHTS).is_file():
        pickle = path / PICKLED
        way = f"give --base and the file {pickle}" if pickle.is_file() else "save it with save_pretrained of PEFT"
        raise ModelError(f"{role}: {path} has no {WEIGHTS}; {way}")
    return Opened(
        source, path, "adapter", read_json(path, ADAPTER, role), SafetensorsHeaders(path / WEIGHTS, role).infos
    )
