"""Finds conf/, checks composed configs, and instantiates their objects. All checks run before a model is loaded."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmq_cli.config.field_types import check_type, check_types, required
from epmq_cli.config.files import conf_dir as conf_dir
from epmq_cli.config.validate import check_keys, check_range
from epmq_cli.errors import ConfigError, TokenError, first_line, literal, placed
from epmq_cli.runtime import distributed

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda or cuda:<index>"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables that hold a Hugging Face token."""
ELSEWHERE = ("recipe", "experiment", "tracking")
"""Groups that set other parts of the config."""
REFERENCE = re.compile(r"\$\{(\w+)\}")
"""A value that refers to another option, such as ${bits}."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
TOKEN_REFERENCE = re.compile(rf"\boc\.env:\s*['\"]?({'|'.join(TOKENS)})\b")

MOVED = {
    "epmq_cli.suites.Suite": "epmq_cli.data.suite.Suite",
    "epmq_cli.data.tiny.Tiny": "epmq_cli.data.tiny.tasks.Tiny",
    "epmq_cli.config.Calib": "epmq_cli.config.schema.Calib",
    "epmq_cli.config.Pack": "epmq_cli.checkpoint.compressed_tensors.CompressedTensorsExporter",
    "epmq_cli.config.schema.Pack": "epmq_cli.checkpoint.compressed_tensors.CompressedTensorsExporter",
    "epmq_cli.config.Evaluation": "epmq_cli.config.schema.Evaluation",
    "epmq_cli.config.Harness": "epmq_cli.config.schema.Harness",
}
"""Old names of classes. Users' configs and the records of checkpoints may still use them."""


@cache
def groups_of(command: str) -> list[str]:
    """The groups of a command's config."""
    primary = OmegaConf.load(conf_dir() / f"{command}.yaml")
    return [str(name) for entry in primary.defaults if isinstance(entry, DictConfig) for name in entry]


@cache
def options_of(command: str) -> list[str]:
    """The keys of a command's config: values, and groups except `recipe` and `experiment`, which set other groups,
    and `tracking`, which sets Hydra's callbacks."""
    values = [str(name) for name in OmegaConf.load(conf_dir() / f"{command}.yaml") if name not in ("defaults", "hydra")]
    return [name for name in dict.fromkeys([*groups_of(command), *values]) if name not in ELSEWHERE]


def check_complete(cfg: DictConfig, command: str) -> None:
    """Raises ConfigError if a command's config has unknown or missing keys, values that are still ???, interpolations
    that cannot be resolved, or a Hugging Face token."""
    options = options_of(command)
    check_keys("the config", [str(name) for name in cfg], options, options)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given, for instance {missing[0]}=...")
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {first_line(error)}") from error
    refuse_tokens([str(resolved)])
    check_type("data_root", str | None, cfg.data_root)
    if "checkpoint" in options:
        check_type("checkpoint", str, cfg.checkpoint)


def refuse_tokens(texts: Iterable[str]) -> None:
    """Raises TokenError if a text contains a Hugging Face token or refers to its variable. Configs are stored in plain
    text."""
    secrets = [token for name in TOKENS if (token := os.environ.get(name))]
    if any(
        TOKEN.search(text) or TOKEN_REFERENCE.search(text) or any(token in text for token in secrets) for text in texts
    ):
        raise TokenError(
            "a Hugging Face token must not be in the config, which is saved in metrics.json and the checkpoint; set "
            f"the environment variable {TOKENS[0]}, which huggingface_hub reads"
        )


def build(group: str, node: DictConfig) -> Any:
    """Instantiates a config group. Its keys and values must match the fields and types of the class that `_target_`
    names."""
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
        raise ConfigError(f"{group} cannot be instantiated: {first_line(error)}") from error


def option_name(group: str, kind: type) -> str:
    """The name of the shipped option of a group, such as `merge`, whose `_target_` is a class; for a user's class, its
    own name in small letters."""
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    return _options_by_target(group).get(f"{kind.__module__}.{kind.__qualname__}", own)


@cache
def _options_by_target(group: str) -> dict[str, str]:
    return {str(OmegaConf.load(path)._target_): path.stem for path in sorted((conf_dir() / group).glob("*.yaml"))}


def class_of(group: str, node: DictConfig) -> type:
    """The class that a config group names."""
    _check_node(group, node)
    kind: type = _class_of(f"{group}._target_", _with_current_names(node)._target_)
    return kind


def fields_of(group: str, node: DictConfig) -> dict[str, bool]:
    """The fields of the class that a config group names, and whether each is required."""
    kind = class_of(group, node)
    needed = required(kind)
    return {name: name in needed for name in _names(kind)}


def _names(kind: type) -> list[str]:
    """The fields of a dataclass, its own before those that all classes of its group have."""
    return [field.name for field in sorted(dataclasses.fields(kind), key=lambda field: field.kw_only is True)]


def references(node: DictConfig) -> dict[str, str]:
    """The options to which values of a node refer, by key: `bits` for `bits: ${bits}`."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return {key: match[1] for key, value in raw.items() if (match := REFERENCE.fullmatch(str(value)))}


def _check_node(group: str, node: object) -> None:
    """Raises ConfigError unless a config group describes an object."""
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{group} must be one of its options (see epmq list {group}), got {literal(node)}")
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
    current._set_parent(node._get_parent())  # interpolations are resolved from the parent
    current._set_key(node._key())
    return current


def _check_parts(group: str, node: DictConfig) -> None:
    """Raises ConfigError if a part of a group does not name a class, or if its keys or values do not fit the class."""
    raw = dict(_targets(group, OmegaConf.to_container(node, resolve=False)))
    parts = list(_targets(group, OmegaConf.to_container(node, resolve=True)))
    for where, part in parts:
        kind = _class_of(f"{where}._target_", part["_target_"])
        check_keys(where, _keys(part), _names(kind), required(kind))
    for where, part in parts:  # after all classes and keys are checked
        names = {key: match[1] for key, value in raw[where].items() if (match := REFERENCE.fullmatch(str(value)))}
        values = {key: part[key] for key in _keys(part)}
        check_types(where, _class_of(where, part["_target_"]), values, names)


def _keys(part: dict[Any, Any]) -> list[str]:
    return [str(key) for key in part if key != "_target_"]


def _class_of(where: str, target: Any) -> Any:
    """The dataclass of this name. Raises ConfigError if it does not exist."""
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
    names = [str(part["_target_"]) for _, part in _targets("", node)]
    return [MOVED.get(name, name) for name in names]


def check_device(name: object) -> None:
    """Raises ConfigError unless this is the name of a device, which the machine need not have."""
    kind, _, index = str(name).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()) or (index and kind != "cuda"):
        raise ConfigError(f"device must be {DEVICES}, got {literal(name)}")


def device_of(name: str) -> torch.device:
    """The device of this name. `cuda` is the first accelerator or, under torchrun, the accelerator of the process.
    `auto` is `cuda` if the machine has an accelerator, else `cpu`."""
    check_device(name)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = (name if name != "auto" else "cuda" if count else "cpu").partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or distributed.local_rank())
    if number >= count:
        who = "" if index or not number else f" for process {number + 1} of torchrun"
        raise ConfigError(f"device={name} is not available{who}: this machine has {count} CUDA devices; use device=cpu")
    return torch.device("cuda", number)


def seed_of(value: object) -> int:
    """The seed. Raises ConfigError unless it is a whole number from 0 to 2^31 - 1."""
    check_range("seed", value, 0, (1 << 31) - 1, integer=True)
    return int(value)  # type: ignore[call-overload, no-any-return]
