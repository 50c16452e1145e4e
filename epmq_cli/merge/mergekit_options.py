"""Translates a mergekit file into the options of epmq, so that a merge has one description.

What has no counterpart is an error that names it. The parameters of a model come before those of its slice, module and
file, as in mergekit; if no rule fits a tensor, the next place counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf

from epmq_cli.config import instantiate
from epmq_cli.errors import ConfigError
from epmq_cli.merge.mergekit_file import PARAMETERS, REQUIRED, MergekitFile, Part
from epmq_cli.merge.settings import is_for_all

NAMES = {"weight": "weights", "lambda": "scale"}
"""Our names of mergekit's parameters, where they differ."""
OURS = {"ramplus_tl": "ram"}
"""Our names of mergekit's methods, where they differ."""
WITHOUT_EFFECT = {"int8_mask": (), "density": ("task_arithmetic",)}
"""Parameters that change no result, and the methods for which that holds; () for all."""
EVERY_INPUT = ("linear", "karcher", "passthrough")
"""The methods that merge the base as one of the models if the file lists it."""
SMALLEST_SUM = 1e-8  # of weights that mergekit divides by

Options = dict[str, Any]


def task_names(models: Iterable[str]) -> dict[str, str]:
    """The name of each model's task: the last part of its path, or of its adapter's."""
    names: dict[str, str] = {}
    for model in models:
        last = model.rpartition("+")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
        name = re.sub(r"\W+", "_", last).strip("_") or "expert"
        name = name if name[0].isalpha() else f"m{name}"
        taken, number = set(names.values()), 2
        while (own := name if number == 2 and name not in taken else f"{name}_{number}") in taken:
            number += 1
        names[model] = own
    return names


def suite_options(file: MergekitFile) -> Options:
    """`suite.base` and `suite.experts`. Without base_model, the first model is the base, as for mergekit's config."""
    base = file.base or file.models[0]
    return {"suite.base": base, "suite.experts": {task: _source(base, model) for model, task in experts(file).items()}}


def experts(file: MergekitFile) -> dict[str, str]:
    """The tasks of the models that are experts, by model."""
    merged = [model for model in file.models if _is_expert(file, model)]
    if not merged:
        raise ConfigError(f"merge_method={file.method} needs a model other than base_model, got {file.base} alone")
    return task_names(merged)


def _is_expert(file: MergekitFile, model: str) -> bool:
    if model != file.base:
        return True
    listed = any(source.model == model for parts in file.parts.values() for part in parts for source in part.inputs)
    return file.method in EVERY_INPUT and listed


def _source(base: str, model: str) -> str:
    """An expert as a suite names it: an adapter of the base by its own path."""
    whole, _, adapter = model.partition("+")
    return adapter if adapter and whole == base else model


def method_options(file: MergekitFile, part: Part) -> Options:
    """The name of the method, as `merge`, and its options as `merge.NAME`, for one part of the result."""
    name = OURS.get(file.method, file.method)
    available = {path.stem: path for path in (instantiate.conf_dir() / "merge").glob("*.yaml")}
    if name not in available:
        raise ConfigError(
            f"merge_method={file.method} is a method of mergekit that epmq does not have (see epmq list merge)"
        )
    node: Any = OmegaConf.load(available[name])
    return {"merge": name, **_Translation(file, part, set(instantiate.fields_of("merge", node))).options()}


class _Translation:
    """The options of one part. `fields`: those of our class."""

    def __init__(self, file: MergekitFile, part: Part, fields: set[str]) -> None:
        self._method, self._part, self._fields = file.method, part, fields
        self._based = file.base is not None
        tasks = experts(file)
        self._inputs = {tasks[source.model]: source for source in part.inputs if source.model in tasks}

    def options(self) -> Options:
        options: Options = {}
        for name, default in PARAMETERS[self._method].items():
            options |= getattr(self, f"_{name}", self._plain)(name, default)
        if "scope" in self._fields:
            options["merge.scope"] = "tensor"
        if "task_vectors" in self._fields:
            options["merge.task_vectors"] = self._based
        return options

    def _plain(self, name: str, default: Any) -> Options:
        """A parameter that our method has under its name or one of NAMES."""
        value = self._shared(name, default)
        own = NAMES.get(name, name)
        if own in self._fields:
            return {} if value is None else {f"merge.{own}": value}
        methods = WITHOUT_EFFECT.get(name)
        if methods is None or (methods and self._method not in methods):
            self._refuse_unless(name, value, default)
        return {}

    def _density(self, name: str, default: Any) -> Options:
        return self._of_experts(name, default) if name in self._fields else self._plain(name, default)

    def _gamma(self, name: str, default: Any) -> Options:
        return self._of_experts(name, default) if name in self._fields else self._plain(name, default)

    def _epsilon(self, name: str, default: Any) -> Options:
        vectors = name in self._fields and "density" in self._fields
        return self._of_experts(name, default) if vectors else self._plain(name, default)

    def _scale(self, name: str, default: Any) -> Options:
        return self._of_experts(name, default)

    def _of_experts(self, name: str, default: Any) -> Options:
        value = _common({task: self._own(task, name, default) for task in self._inputs})
        return {} if value is None else {f"merge.{name}": value}

    def _weight(self, name: str, default: Any) -> Options:
        weights = {task: self._own(task, name, default) for task in self._inputs}
        equal = _common(weights)
        normalize = self._flag("normalize")
        if normalize and not {"normalize", "normalize_weights"} & self._fields:
            if "combine" not in self._fields:
                weights = self._normalized(weights)
                equal = _common(weights)
            elif isinstance(equal, (int, float)):
                return {}  # the mean over the values that agree does not depend on it
        if equal == 1:
            return {}
        if "weights" not in self._fields:
            raise self._refusal("weight", weights)
        return {"merge.weights": weights if isinstance(equal, Mapping) else dict.fromkeys(weights, equal)}

    def _normalized(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The weights divided by their sum."""
        if not all(isinstance(weight, (int, float)) for weight in weights.values()):
            raise ConfigError(
                f"merge_method={self._method} with normalize: true takes one weight for each model here, without "
                "gradients and filters; set normalize: false"
            )
        total = sum(weights.values())
        return {task: weight / total if abs(total) >= SMALLEST_SUM else weight for task, weight in weights.items()}

    def _normalize(self, name: str, default: Any) -> Options:
        value = self._flag(name)
        if name in self._fields:
            return {f"merge.{name}": value}
        if "combine" in self._fields:
            return {"merge.combine": "mean" if value else "sum"}
        return {}  # _weight has divided the weights

    def _rescale(self, name: str, default: Any) -> Options:
        value = self._flag(name)
        if name in self._fields:
            return {f"merge.{name}": value}
        self._refuse_unless(name, value, default)
        return {}

    def _flag(self, name: str) -> bool:
        """The value of a parameter that is true or false."""
        value = self._shared(name, PARAMETERS[self._method].get(name, False))
        if not isinstance(value, (bool, int)):
            raise ConfigError(f"{name} must be true or false for all tensors, got {value}")
        return bool(value)

    def _shared(self, name: str, default: Any) -> Any:
        return setting(name, [scope.get(name) for scope in self._part.scopes], default)

    def _own(self, task: str, name: str, default: Any) -> Any:
        scopes = [self._inputs[task].parameters, *self._part.scopes]
        return setting(name, [scope.get(name) for scope in scopes], default, self._inputs[task].model)

    def _refuse_unless(self, name: str, value: Any, allowed: Any) -> None:
        if value != allowed:
            raise self._refusal(name, value)

    def _refusal(self, name: str, value: Any) -> ConfigError:
        options = ", ".join(sorted(self._fields)) or "none"
        return ConfigError(
            f"merge_method={self._method} with {name}={value} has no counterpart in epmq; its options are {options}"
        )


def setting(name: str, values: Iterable[Any], default: Any, model: str = "") -> Any:
    """The setting of a parameter in our form, from its values at several places, the most specific place first."""
    rules: list[Mapping[str, Any]] = []
    for value in values:
        if value is not None:
            rules += value if isinstance(value, list) and isinstance(value[0], Mapping) else [{"value": value}]
    last = next((index for index, rule in enumerate(rules) if is_for_all(rule)), None)
    if last is None and default is not REQUIRED and (rules or default is not None):
        rules.append({"value": 1.0 if default is None else default})
    elif last is None and rules:
        raise ConfigError(f"{name} must end with a rule without filter, for tensors that no other rule names")
    elif last is None:
        if default is REQUIRED:
            raise ConfigError(
                f"the file gives no {name}{f' for {model}' if model else ''}, and mergekit has no default"
            )
        return None
    else:
        rules = rules[: last + 1]
    rules = [each for rule in rules for each in _outside_first(rule)]
    return rules[0]["value"] if len(rules) == 1 else [dict(rule) for rule in rules]


def _outside_first(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A rule, and one before it if its value is a gradient whose ends differ: mergekit takes the first number for all
    tensors outside the layers, also for those behind them."""
    value = rule["value"]
    gradient = isinstance(value, list) and value[0] != value[-1]
    return [{**rule, "layers": False, "value": value[0]}, rule] if gradient else [rule]


def _common(values: Mapping[str, Any]) -> Any:
    """The value that all tasks share, else the mapping from tasks."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else dict(values)
