"""Where conf/ is, and from a composed config to the objects of a command: every check made before a model is loaded."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmq_cli.config.field_types import check_type, check_types, required
from epmq_cli.config.validate import check_keys, check_range
from epmq_cli.errors import ConfigError, TokenError, first_line, placed, shown
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda or cuda:<index>"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that hold a token of the hub."""
REFERENCE = re.compile(r"\$\{(\w+)\}")
"""A value that is that of another option, such as ${bits}."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
ASKED = re.compile(rf"\boc\.env:\s*['\"]?({'|'.join(TOKENS)})\b")

MOVED = {
    "epmq_cli.suites.Suite": "epmq_cli.data.suite.Suite",
    "epmq_cli.data.tiny.Tiny": "epmq_cli.data.tiny.tasks.Tiny",
    "epmq_cli.config.Calib": "epmq_cli.config.schema.Calib",
    "epmq_cli.config.Pack": "epmq_cli.checkpoint.compressed_tensors.CompressedTensorsExporter",
    "epmq_cli.config.schema.Pack": "epmq_cli.checkpoint.compressed_tensors.CompressedTensorsExporter",
    "epmq_cli.config.Evaluation": "epmq_cli.config.schema.Evaluation",
    "epmq_cli.config.Harness": "epmq_cli.config.schema.Harness",
}
"""Earlier names of classes, which users' configs and the records of checkpoints still have."""


def conf_dir() -> Path:
    """The folder of the shipped configs: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@cache
def groups_of(command: str) -> list[str]:
    """The groups of a command's config."""
    primary = OmegaConf.load(conf_dir() / f"{command}.yaml")
    return [str(name) for entry in primary.defaults if isinstance(entry, DictConfig) for name in entry]


@cache
def options_of(command: str) -> list[str]:
    """The keys of a command's config: groups, but for experiments, which set others, and values."""
    values = [str(name) for name in OmegaConf.load(conf_dir() / f"{command}.yaml") if name not in ("defaults", "hydra")]
    return [name for name in dict.fromkeys([*groups_of(command), *values]) if name != "experiment"]


def check_complete(cfg: DictConfig, command: str) -> None:
    """Refuses a command's config with keys that it has not or lacks, a value that is still ???, an interpolation that
    leads nowhere or a token of the hub."""
    known = options_of(command)
    check_keys("the config", [str(name) for name in cfg], known, known)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given, for instance {missing[0]}=...")
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {first_line(error)}") from error
    refuse_tokens([str(resolved)])
    check_type("data_root", str | None, cfg.data_root)
    if "checkpoint" in known:
        check_type("checkpoint", str, cfg.checkpoint)


def refuse_tokens(texts: Iterable[str]) -> None:
    """TokenError where one of these texts holds a token of the hub, or asks for one, since configs are stored in plain
    sight."""
    known = [token for name in TOKENS if (token := os.environ.get(name))]
    if any(TOKEN.search(text) or ASKED.search(text) or any(token in text for token in known) for text in texts):
        raise TokenError(
            "a token of the hub must not be in the config, which goes into metrics.json and the checkpoint; leave it "
            f"to the variable {TOKENS[0]}, which the hub's own library reads"
        )


def build(group: str, node: DictConfig) -> Any:
    """The object that a config group describes; its keys must be the fields of the class that `_target_` names, and
    its values of their types."""
    import hydra

    _check_node(group, node)
    node = _with_current_names(node)
    _check_parts(group, node)
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            place = re.search(r"^full_key: (\S+)$", str(error), re.M)
            raise placed(cause, place[1] if place else group) from None
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{group} cannot be made: {first_line(error)}") from error


def fields_of(group: str, node: DictConfig) -> dict[str, bool]:
    """The fields of the class that a config group names, and whether each must be given."""
    _check_node(group, node)
    node = _with_current_names(node)
    kind = _class_of(f"{group}._target_", node._target_)
    needed = required(kind)
    return {field.name: field.name in needed for field in dataclasses.fields(kind)}


def references(node: DictConfig) -> dict[str, str]:
    """The options that values of a node stand for, by key: `bits` for `bits: ${bits}`."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return {key: found[1] for key, value in raw.items() if (found := REFERENCE.fullmatch(str(value)))}


def _check_node(group: str, node: object) -> None:
    """ConfigError unless a config group describes an object."""
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{group} must be one of its options (see epmq list {group}), got {shown(node)}")
    if "_target_" not in node:
        raise ConfigError(f"{group} has no _target_; copy the first lines of one of the shipped {group} files")


def _with_current_names(node: DictConfig) -> DictConfig:
    """The config with the current name of every class in `MOVED`."""
    plain = OmegaConf.to_container(node, resolve=False)
    if not any(str(part["_target_"]) in MOVED for _, part in _targets("", plain)):
        return node
    for _, part in _targets("", plain):
        part["_target_"] = MOVED.get(str(part["_target_"]), part["_target_"])
    current: DictConfig = OmegaConf.create(plain)  # type: ignore[assignment]
    current._set_parent(node._get_parent())  # for its interpolations
    current._set_key(node._key())
    return current


def _check_parts(group: str, node: DictConfig) -> None:
    """ConfigError where a part of a group names no class, or has other keys or values than the class takes."""
    raw = dict(_targets(group, OmegaConf.to_container(node, resolve=False)))
    parts = list(_targets(group, OmegaConf.to_container(node, resolve=True)))
    for where, part in parts:
        kind = _class_of(f"{where}._target_", part["_target_"])
        check_keys(where, _keys(part), [field.name for field in dataclasses.fields(kind)], required(kind))
    for where, part in parts:  # when it is known of all of them what they are
        names = {key: found[1] for key, value in raw[where].items() if (found := REFERENCE.fullmatch(str(value)))}
        values = {key: part[key] for key in _keys(part)}
        check_types(where, _class_of(where, part["_target_"]), values, names)


def _keys(part: dict[Any, Any]) -> list[str]:
    return [str(key) for key in part if key != "_target_"]


def _class_of(where: str, target: Any) -> Any:
    """The dataclass of this name; ConfigError where there is none."""
    import hydra

    try:
        kind = hydra.utils.get_class(target)
        dataclasses.fields(kind)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} must name one of epmq's classes, got {target!r}") from error
    return kind


def _targets(where: str, node: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    if isinstance(node, dict) and "_target_" in node:
        yield where, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _targets(f"{where}.{key}", child)


def targets(node: Any) -> list[str]:
    """The current name of every `_target_` in a config, at any depth."""
    found = [str(part["_target_"]) for _, part in _targets("", node)]
    return [MOVED.get(target, target) for target in found]


def device_of(name: str) -> torch.device:
    """The device of this name; `cuda` is the first accelerator, of torchrun's processes each one's own, and `auto` that
    or the CPU where there is none."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = str(name if name != "auto" else "cuda" if found else "cpu").partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ConfigError(f"device must be {DEVICES}, got {shown(name)}")
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or distributed.local_rank())
    if number >= found:
        who = "" if index or not number else f" for process {number + 1} of torchrun"
        raise ConfigError(f"device={name} is not there{who}: this machine has {found} CUDA devices; use device=cpu")
    return torch.device("cuda", number)


def seed_of(value: object) -> int:
    """The seed; ConfigError unless it is a whole number from 0 to 2^31 - 1."""
    check_range("seed", value, 0, (1 << 31) - 1, integer=True)
    return int(value)  # type: ignore[call-overload, no-any-return]
