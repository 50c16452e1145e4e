"""Reads and checks the adapter_config.json of a PEFT LoRA adapter: the options that affect the merged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from epmq_cli.errors import ModelError, literal
from epmq_cli.models.headers import read_json
from epmq_cli.models.mixtures import PARAMETERS
from epmq_cli.runtime.console import log

CONFIG = "adapter_config.json"
REMEDY = "merge it with merge_and_unload of PEFT, save that model with save_pretrained, and give its folder"
UNMERGEABLE = "PEFT cannot merge it either; train a LoRA adapter or the whole model instead"
PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "LILY",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "XLORA",
)
"""PEFT types that cannot be merged into weights."""

UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that do not change the base's weights."""

RESIDUALS = ("pissa", "olora")
"""Values of `init_lora_weights` that subtract a part of the base's weights. epmq recomputes it from the weights."""

MOVED = {
    "pissa_niter_": "by a randomized singular value decomposition, which cannot be repeated",
    "corda": "by the covariances of its training data",
    "lora_ga": "by the gradients of its training data",
    "loftq": "by quantizing them with an unknown quantizer",
}
"""Prefixes of values of `init_lora_weights` that change the base's weights in a way that epmq cannot repeat."""

SWITCHES = ("use_rslora", "fan_in_fan_out", "use_dora", "ensure_weight_tying")
REFUSED = {
    "alora_invocation_tokens": UNMERGEABLE,
    "arrow_config": UNMERGEABLE,
    "layer_replication": REMEDY,
    "megatron_config": REMEDY,
    "monteclora_config": REMEDY,
    "use_bdlora": REMEDY,
    "use_qalora": REMEDY,
}
"""Options that epmq does not support if they are set, with the remedy."""

READ = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "kasa_config",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "rank_pattern",
    "revision",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
)
IGNORED = (
    "auto_mapping",
    "corda_config",
    "enable_lora",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "modules_to_tie",
    "peft_version",
    "qalora_group_size",
    "r",
    "runtime_config",
    "target_modules",
    "target_modules_to_tie",
    "velora_config",
)
"""Options that affect training only, or that the adapter's tensors imply."""

PATTERN_SECONDS = 1.0  # per pattern and module; a malicious pattern can backtrack without end
UNUSABLE = (AttributeError, TypeError, ValueError, OverflowError, RecursionError, TimeoutError, regex.error)
"""Exceptions that an invalid alpha or an invalid regular expression raises."""


@dataclass(frozen=True)
class AdapterConfig:
    """The options of one LoRA adapter. `init`: a member of RESIDUALS, "kasa", or None if the base is unchanged.
    `parameters`: the parameter of all experts that PEFT adapts, by module of a linear of an expert."""

    path: Path
    role: str
    values: dict[str, Any]
    init: str | None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def is_set(self, option: str) -> bool:
        """Whether a switch is on."""
        return bool(self.values.get(option))

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank stabilization. Raises ModelError if alpha is not a finite number."""
        return self._alpha(module) / (math.sqrt(rank) if self.is_set("use_rslora") else rank)

    def _alpha(self, module: str) -> float:
        try:
            patterns: dict[str, float] = self.values.get("alpha_pattern") or {}
            name = f"{module}.weight" if self._is_parameter(f"{module}.weight") else self.parameters.get(module, module)
            alphas = (alpha for key, alpha in patterns.items() if _matches(key, name))
            alpha = next(alphas, self.values.get("lora_alpha", 8))
            if isinstance(alpha, bool) or not math.isfinite(float(alpha)):
                raise ValueError(f"{alpha} is not a finite number")
            return float(alpha)
        except UNUSABLE as error:
            raise ModelError(
                f"{self.role}: lora_alpha or alpha_pattern in {self.path / CONFIG} is invalid ({error}); fetch "
                "the adapter again"
            ) from error

    def _is_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names a tensor. Patterns then match tensors instead of modules."""
        return any(
            name == target or name.endswith(f".{target}") for target in self.values.get("target_parameters") or ()
        )

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names a module."""
        names = self.values.get("modules_to_save") or ()
        return any(module == name or module.endswith(f".{name}") for name in names if isinstance(name, str))

    def token_rows(self, module: str) -> list[int]:
        """The trained rows of a table from `trainable_token_indices`. Raises ModelError if they are not token ids."""
        rows = self.values.get("trainable_token_indices")
        if isinstance(rows, dict):
            rows = next((value for key, value in rows.items() if module == key or module.endswith(f".{key}")), None)
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise ModelError(
                f"{self.role}: trainable_token_indices in {self.path / CONFIG} must list the token ids of {module}, "
                f"got {literal(self.values.get('trainable_token_indices'))}; fetch the adapter again"
            )
        return rows


def read_config(path: Path, role: str) -> AdapterConfig:
    """Reads the config of the adapter in a folder. Raises ModelError if epmq cannot merge such an adapter."""
    values = read_json(path, CONFIG, role)
    kind = values.get("peft_type")
    if kind != "LORA":
        way = UNMERGEABLE if kind in PROMPTS else REMEDY
        raise ModelError(
            f"{role}: {path} is an adapter of type {literal(kind)}, but epmq merges adapters of type LORA only; {way}"
        )
    for option, way in REFUSED.items():
        if values.get(option):
            raise ModelError(f"{role}: {path} is a LoRA adapter with {option}, which epmq cannot merge; {way}")
    for option in SWITCHES:
        if not isinstance(values.get(option), bool | None):
            raise ModelError(
                f"{role}: {option} in {path / CONFIG} must be true or false, got {literal(values[option])}; fetch the "
                "adapter again"
            )
    _check_modules(path, role, values)
    _check_unknown(path, role, values)
    return AdapterConfig(path, role, values, "kasa" if values.get("kasa_config") else _init(path, role, values))


def _init(path: Path, role: str, values: dict[str, Any]) -> str | None:
    """The effect of `init_lora_weights` on the base's weights: a member of RESIDUALS, or None for no effect."""
    setting = values.get("init_lora_weights")
    value = setting.lower() if isinstance(setting, str) else setting
    if any(value is option or (isinstance(option, str) and value == option) for option in UNCHANGED):
        return None
    if isinstance(value, str) and value in RESIDUALS:
        return value
    how = next((how for start, how in MOVED.items() if isinstance(value, str) and value.startswith(start)), None)
    if how is None:
        names = ", ".join([*(name for name in UNCHANGED if isinstance(name, str)), *RESIDUALS])
        raise ModelError(
            f"{role}: init_lora_weights in {path / CONFIG} must be true, false or one of {names}, got "
            f"{literal(setting)}; {REMEDY}"
        )
    raise ModelError(
        f"{role}: {path} is a LoRA adapter with init_lora_weights={setting}, which changed the base's weights before "
        f"training {how}; save the adapter again from training with path_initial_model_for_weight_conversion (PiSSA, "
        "CorDA, LoRA-GA), save the model that merge_and_unload returns, or give the changed base as the base and set "
        f"init_lora_weights to true in {CONFIG}"
    )


def _check_modules(path: Path, role: str, values: dict[str, Any]) -> None:
    """Raises ModelError if `modules_to_save` is not a list, or if `target_parameters` names anything but weights."""
    saved = values.get("modules_to_save")
    if not isinstance(saved, list | None):
        raise ModelError(
            f"{role}: modules_to_save in {path / CONFIG} must be a list of modules, got {literal(saved)}; fetch the "
            "adapter again"
        )
    targets = values.get("target_parameters") or []
    ends = ("weight", *PARAMETERS)
    if not isinstance(targets, list) or not all(isinstance(own, str) and own.endswith(ends) for own in targets):
        raise ModelError(
            f"{role}: {path} is a LoRA adapter with target_parameters {literal(targets)}, but epmq merges only those "
            f"that are the weight of a module, or {' and '.join(PARAMETERS)} of experts; {REMEDY}"
        )


def _check_unknown(path: Path, role: str, values: dict[str, Any]) -> None:
    """Raises ModelError for an unknown option that is switched on. Warns about an unknown option with another value."""
    names = {*SWITCHES, *REFUSED, *READ, *IGNORED}
    for option, value in values.items():
        if option in names or not value or value == "none":
            continue
        if value is True or isinstance(value, dict | list):
            raise ModelError(
                f"{role}: {path} is a LoRA adapter with {option}, which this version of epmq does not support; {REMEDY}"
            )
        log.warning(
            "%s: %s has %s=%s, which this version of epmq does not know and ignores",
            role,
            path / CONFIG,
            option,
            value,
        )


def _matches(pattern: str, module: str) -> bool:
    """Whether a PEFT pattern matches a module name, or the end of the name after a dot."""
    return regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_SECONDS) is not None
