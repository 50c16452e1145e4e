"""Reads the YAML files of mergekit 0.1.5 (https://github.com/arcee-ai/mergekit): which models they merge, and how.

Keys and parameters that mergekit does not know are errors, also where mergekit ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from epmq_cli.config.validate import check_choice, check_keys
from epmq_cli.errors import ConfigError, first_line, literal

REQUIRED = "required"
"""In place of the default of a parameter that mergekit requires."""

VECTORS: dict[str, Any] = {
    "weight": REQUIRED,
    "density": 1.0,
    "lambda": 1.0,
    "normalize": False,
    "rescale": False,
    "int8_mask": False,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": REQUIRED, "normalize": True},
    "task_arithmetic": VECTORS,
    "ties": {**VECTORS, "normalize": True},
    "dare_linear": {**VECTORS, "rescale": True},
    "dare_ties": {**VECTORS, "rescale": True},
    "breadcrumbs": {**VECTORS, "gamma": 0.01},
    "breadcrumbs_ties": {**VECTORS, "gamma": 0.01},
    "della": {**VECTORS, "normalize": True, "rescale": True, "epsilon": 0.15},
    "della_linear": {**VECTORS, "rescale": True, "epsilon": 0.15},
    "slerp": {"t": REQUIRED},
    "nuslerp": {"weight": REQUIRED, "nuslerp_row_wise": False, "nuslerp_flatten": True},
    "multislerp": {"weight": REQUIRED, "normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "nearswap": {"t": REQUIRED},
    "arcee_fusion": {},
    "sce": {"int8_mask": False, "select_topk": 1.0},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "passthrough": {"scale": None},
}
"""mergekit's parameters and their defaults, by the name of the method."""
WITHOUT_BASE = ("linear", "karcher", "passthrough", "nuslerp", "multislerp")
"""The methods that need no base_model."""
KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
DTYPES = ("float32", "float16", "bfloat16")

Settings = Mapping[str, Any]
"""The `parameters` of a model, a slice, a module or a file, by name."""


@dataclass(frozen=True)
class Input:
    """A model that takes part, with its own parameters and, in a slice, its layers from the first to before the last.

    `model`: as in the file: a folder or hub id, or `model+adapter`.
    """

    model: str
    parameters: Settings
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Part:
    """A slice of the result, or all of it: what is merged and its parameters, the most specific ones first."""

    inputs: tuple[Input, ...]
    scopes: tuple[Settings, ...]


@dataclass(frozen=True)
class MergekitFile:
    """A checked file. `parts`: the slices of each module of the result, `{"": [part]}` if it lists models."""

    method: str
    base: str | None
    parts: dict[str, list[Part]]
    dtype: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    chat_template: str | None = None
    models: list[str] = field(default_factory=list)
    """All models in the file's order, without those that only the tokenizer names."""

    @property
    def sliced(self) -> bool:
        """Whether the file names layers."""
        return any(source.layers for parts in self.parts.values() for part in parts for source in part.inputs)


def read_mergekit(path: Path) -> MergekitFile:
    """The contents of a mergekit file. ConfigError if it cannot be read or has a key or value that is not allowed."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"merge.file={path} cannot be read: {first_line(error)}") from error
    return checked(content, str(path))


def checked(content: Any, where: str = "the file") -> MergekitFile:
    """The contents of a file as YAML reads them, checked. `where`: its name in errors."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} must be a mapping with merge_method and models, slices or modules")
    check_keys(where, content, KEYS, ("merge_method",))
    check_choice("merge_method", content["merge_method"], PARAMETERS)
    method = content["merge_method"]
    base = None if content.get("base_model") is None else _model("base_model", content["base_model"])
    parts = _parts(content, method, _settings("parameters", content.get("parameters"), method), base)
    named = [source.model for each in parts.values() for part in each for source in part.inputs]
    models = list(dict.fromkeys([*([base] if base else []), *named]))
    if base is None and method not in WITHOUT_BASE:
        raise ConfigError(f"merge_method={method} needs base_model; name the model that the others were tuned from")
    for key in ("dtype", "out_dtype"):
        if content.get(key) is not None:
            check_choice(key, str(content[key]).removeprefix("torch."), DTYPES)
    dtype = content.get("out_dtype") or content.get("dtype")
    template = content.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"chat_template must be text, got {literal(template)}")
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    return MergekitFile(method, base, parts, dtype, _tokenizer(content), template, models)


def _parts(content: Mapping[str, Any], method: str, own: Settings, base: str | None) -> dict[str, list[Part]]:
    """The slices of each module, with the parameters of the file at the end of their scopes."""
    kinds = [key for key in ("models", "slices", "modules") if content.get(key)]
    if len(kinds) != 1:
        raise ConfigError(f"a mergekit file has one of models, slices and modules, got {' and '.join(kinds) or 'none'}")
    if kinds != ["modules"]:
        return {"": _module(content, "", method, own, base)}
    modules = content["modules"]
    if not isinstance(modules, Mapping):
        raise ConfigError(f"modules must be a mapping from names to slices or models, got {literal(modules)}")
    found = {}
    for name, module in modules.items():
        where = f"modules.{name}"
        if not isinstance(module, Mapping):
            raise ConfigError(f"{where} must be a mapping with slices or models, got {literal(module)}")
        check_keys(where, module, ("slices", "models", "parameters"))
        inner = _settings(f"{where}.parameters", module.get("parameters"), method)
        found[str(name)] = _module(module, f"{where}.", method, inner, base, own)
    return found


def _module(
    content: Mapping[str, Any], where: str, method: str, own: Settings, base: str | None, outer: Settings | None = None
) -> list[Part]:
    scopes = (own,) if outer is None else (own, outer)
    if bool(content.get("models")) == bool(content.get("slices")):
        raise ConfigError(f"{where.rstrip('.')} must have either slices or models")
    if content.get("models"):
        return [Part(_inputs(f"{where}models", content["models"], method, ("model", "parameters")), scopes)]
    slices = _list(f"{where}slices", content["slices"])
    parts = []
    for index, each in enumerate(slices):
        place = f"{where}slices[{index}]"
        check_keys(place, each, ("sources", "base_model", "parameters", "residual_weight"), ("sources",))
        if each.get("residual_weight") is not None:
            raise ConfigError(f"{place}.residual_weight has no effect in mergekit 0.1.5; remove it")
        if each.get("base_model") is not None and _model(f"{place}.base_model", each["base_model"]) != base:
            raise ConfigError(f"{place}.base_model must be the file's base_model; epmq has one base for all slices")
        keys = ("model", "layer_range", "parameters")
        inputs = _inputs(f"{place}.sources", each["sources"], method, keys)
        sizes = {source.layers[1] - source.layers[0] for source in inputs if source.layers}
        if len(sizes) > 1:
            raise ConfigError(f"{place}.sources must have as many layers each, got {sorted(sizes)}")
        parts.append(Part(inputs, (_settings(f"{place}.parameters", each.get("parameters"), method), *scopes)))
    return parts


def _inputs(where: str, value: Any, method: str, keys: Sequence[str]) -> tuple[Input, ...]:
    inputs = []
    for index, each in enumerate(_list(where, value)):
        place = f"{where}[{index}]"
        check_keys(place, each, keys, [key for key in keys if key != "parameters"])
        parameters = _settings(f"{place}.parameters", each.get("parameters"), method)
        layers = _layers(f"{place}.layer_range", each["layer_range"]) if "layer_range" in keys else None
        inputs.append(Input(_model(f"{place}.model", each["model"]), parameters, layers))
    twice = {source.model for source in inputs if [other.model for other in inputs].count(source.model) > 1}
    if twice:
        raise ConfigError(f"{where} must name each model once, got {', '.join(sorted(twice))} twice")
    if method == "passthrough" and len(inputs) > 1:
        raise ConfigError(f"merge_method=passthrough takes one model, or one per slice; {where} has {len(inputs)}")
    return tuple(inputs)


def _layers(where: str, value: Any) -> tuple[int, int]:
    whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(item) is int for item in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise ConfigError(f"{where} must be [first, last + 1], such as [0, 16], got {literal(value)}")
    return value[0], value[1]


def _list(where: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ConfigError(f"{where} must be a list of mappings, got {literal(value)}")
    return value


def _model(where: str, value: Any) -> str:
    """A model as text; mergekit's mapping {model, lora} is read as model+lora."""
    if isinstance(value, Mapping):
        check_keys(where, value, ("model", "lora"), ("model",))
        parts = [_path(where, part) for part in (value["model"], value.get("lora")) if part is not None]
        return "+".join(parts)
    return _path(where, value)


def _path(where: str, value: Any) -> str:
    if isinstance(value, Mapping):
        check_keys(where, value, ("path", "revision"), ("path",))
        revision = value.get("revision")
        return _path(where, value["path"]) + (f"@{revision}" if revision else "")
    if not isinstance(value, str) or not value.strip() or value.count("+") > 1:
        raise ConfigError(f"{where} must be a folder, a hub id, or model+adapter, got {literal(value)}")
    return value


def _settings(where: str, value: Any, method: str) -> Settings:
    """The parameters at one place of the file, with numbers as numbers."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {literal(value)}")
    check_keys(where, value, PARAMETERS[method])
    return {name: _setting(f"{where}.{name}", own) for name, own in value.items() if own is not None}


def _setting(where: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return _number(where, value)
    if not any(isinstance(item, Mapping) for item in value):
        return [_number(where, item) for item in value]
    rules = []
    for index, rule in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(rule, Mapping):
            raise ConfigError(f"{place} must be a rule {{filter, value}} as the others are, got {literal(rule)}")
        check_keys(place, rule, ("filter", "value"), ("value",))
        own = rule["value"]
        values = [_number(place, item) for item in own] if isinstance(own, list) else _number(place, own)
        everywhere = rule.get("filter") in (None, "*")
        rules.append({"value": values} if everywhere else {"filter": str(rule["filter"]), "value": values})
        if everywhere:
            break  # no later rule counts
    return rules


def _number(where: str, value: Any) -> float | bool:
    """A number or a truth value. YAML 1.1 reads 1e-5 as text, which mergekit and epmq read as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, (int, float)):
        raise ConfigError(
            f"{where} must be a number, a list of numbers or rules {{filter, value}}, got {literal(value)}"
        )
    return value


def _tokenizer(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The key `tokenizer`; `tokenizer_source` is its source."""
    source, tokenizer = content.get("tokenizer_source"), content.get("tokenizer")
    if source is not None and tokenizer is not None:
        raise ConfigError("a mergekit file has tokenizer_source or tokenizer, not both")
    if source is not None:
        return {"source": _model("tokenizer_source", source)}
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, Mapping):
        raise ConfigError(f"tokenizer must be a mapping, got {literal(tokenizer)}")
    check_keys("tokenizer", tokenizer, ("source", "tokens", "pad_to_multiple_of"))
    return {**tokenizer, "source": _model("tokenizer.source", tokenizer.get("source") or "union")}
