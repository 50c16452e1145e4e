"""The parameters of merge methods: each field of a method declares what it takes, in its annotation.

    density: Annotated[Setting, PerTensor(0, 1, open_low=True)]

`Parameters` checks the values, and `epmq list merge=NAME` prints what each parameter takes. A parameter that no YAML
file explains has a text in its annotation too. The command line imports this module, so it does not import torch.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from epmq_cli.config.instantiate import option_name
from epmq_cli.config.validate import check_choice, check_keys, check_range
from epmq_cli.errors import ConfigError, literal
from epmq_cli.merge.settings import Setting, is_for_all

LARGEST_WEIGHT = 100


class Kind(ABC):
    """What a parameter takes; its text says it in words."""

    @abstractmethod
    def check(self, where: str, value: Any) -> None:
        """ConfigError unless this parameter takes the value."""

    def check_tasks(self, where: str, value: Any, tasks: Sequence[str]) -> None:  # noqa: B027  most fit all suites
        """ConfigError if the value does not fit a suite with these tasks."""


@dataclass(frozen=True)
class Number(Kind):
    """A number in [low, high]; in (low, high] with `open_low`. `integer`: a whole number. `null`: or null."""

    low: float
    high: float
    open_low: bool = False
    integer: bool = False
    null: bool = False

    def check(self, where: str, value: object) -> None:
        """ConfigError unless this parameter takes the value."""
        if value is not None or not self.null:
            check_range(where, value, self.low, self.high, open_low=self.open_low, integer=self.integer)

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        return f"{kind} in {'(' if self.open_low else '['}{self.low}, {self.high}]{', or null' if self.null else ''}"


@dataclass(frozen=True)
class PerTensor(Number):
    """A setting, whose numbers lie in the range: it may differ between tensors. See `settings.py` for its forms."""

    def check(self, where: str, value: Setting) -> None:
        """ConfigError unless this parameter takes the value."""
        if value is None and self.null:
            return
        if not isinstance(value, (list, tuple)) or not value:
            if isinstance(value, (list, tuple, Mapping, str)) or value is None:
                raise ConfigError(
                    f"{where} must be {Number.__str__(self)}, a list of them over the layers, or a list of rules "
                    f"{{filter, value}}; got {literal(value)}"
                )
            super().check(where, value)
            return
        rules = isinstance(value[0], Mapping)
        for index, item in enumerate(value):
            place = f"{where}[{index}]"
            if rules:
                _check_rule(place, item)
                PerTensor.check(self, f"{place}.value", item["value"])
            else:
                super().check(place, item)
        if rules and not is_for_all(value[-1]):
            raise ConfigError(f"{where} must end with a rule without filter, for tensors that no other rule names")

    def __str__(self) -> str:
        return f"{super().__str__()}, per tensor"


@dataclass(frozen=True)
class PerExpert(PerTensor):
    """A setting that may also be a mapping from tasks to settings. `partial`: a mapping may leave out tasks."""

    partial: bool = False

    def check(self, where: str, value: Setting) -> None:
        """ConfigError unless this parameter takes the value."""
        if isinstance(value, Mapping):
            for task, own in value.items():
                super().check(f"{where}.{task}", own)
        else:
            super().check(where, value)

    def check_tasks(self, where: str, value: Setting, tasks: Sequence[str]) -> None:
        """ConfigError if a mapping names tasks that the suite lacks, or leaves out others."""
        if isinstance(value, Mapping):
            check_keys(where, value, tasks, () if self.partial else tasks)

    def __str__(self) -> str:
        return f"{super().__str__()} and expert"


@dataclass(frozen=True)
class Weight(PerExpert):
    """Weights of experts: null, or a task that a mapping leaves out, is a weight of 1."""

    low: float = 0
    high: float = LARGEST_WEIGHT
    null: bool = True
    partial: bool = True

    def check_tasks(self, where: str, value: Setting, tasks: Sequence[str]) -> None:
        """ConfigError if weights name a task that the suite lacks, or are 0 for every task."""
        super().check_tasks(where, value, tasks)
        if value == 0 or (isinstance(value, Mapping) and all(value.get(task, 1) == 0 for task in tasks)):
            raise ConfigError(f"{where} must leave at least one task above 0, got 0 for every task")


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names. `old`: names of earlier versions, which configs may still have."""

    options: tuple[str, ...]
    old: tuple[str, ...] = ()

    def check(self, where: str, value: object) -> None:
        """ConfigError unless this parameter takes the value."""
        if value not in self.old:
            check_choice(where, value, self.options)

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}"


def _check_rule(where: str, rule: object) -> None:
    if not isinstance(rule, Mapping):
        raise ConfigError(f"{where} must be a rule {{filter, value}} as the first item is, got {literal(rule)}")
    check_keys(where, rule, ("filter", "layers", "value"), ("value",))
    if not isinstance(rule.get("filter", ""), (str, type(None))):
        raise ConfigError(f"{where}.filter must be a part of tensor names, got {literal(rule['filter'])}")
    if rule.get("layers") is not None:
        check_choice(f"{where}.layers", rule["layers"], (True, False))


@dataclass(frozen=True)
class Posts(Kind):
    """A list of post-processors; see `post.py`."""

    def check(self, where: str, value: object) -> None:
        """ConfigError unless the list names post-processors with options that they take."""
        from epmq_cli.merge.post import post_processors  # it imports this module

        post_processors(where, value)

    def __str__(self) -> str:
        from epmq_cli.merge.post import POSTS

        return f"a list of {', '.join(POSTS)}"


def parameters_of(method: type) -> dict[str, Kind]:
    """What each field of a method's class takes, for fields that declare it."""
    return {name: item for name, item in _annotations(method) if isinstance(item, Kind)}


def texts_of(method: type) -> dict[str, str]:
    """The text of each field, for fields that have one."""
    return {name: item for name, item in _annotations(method) if isinstance(item, str)}


def _annotations(method: type) -> Iterator[tuple[str, object]]:
    for name, hint in typing.get_type_hints(method, include_extras=True).items():
        for item in getattr(hint, "__metadata__", ()):
            yield name, item


def check_parameters(where: str, method: object) -> None:
    """ConfigError if a field of a method or post-processor has a value that it does not take."""
    for name, kind in parameters_of(type(method)).items():
        kind.check(f"{where}.{name}", getattr(method, name))


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A base of merge methods, which checks their parameters and the number of experts.

    Its fields are parameters that the YAML files leave out; see `post.py` and `core_space.py`.
    """

    needs: ClassVar[frozenset[Any]]

    experts: ClassVar[tuple[int, int | None]] = (1, None)
    """The least and the largest number of experts that the method merges; None for any number."""

    core: ClassVar[bool | str] = True
    """Whether the method merges the task vectors, whatever the base is, as `space=core` requires; or the name of the
    option with which it does."""

    post: Annotated[
        Sequence[Any], Posts(), "post-processors of the merged tensors, in their order; see epmq list merge.post"
    ] = ()
    space: Annotated[
        str,
        Choice(("full", "core")),
        "core merges LoRA adapters in their common low-rank space, without dense task vectors",
    ] = "full"

    def __post_init__(self) -> None:
        check_parameters("merge", self)
        if self.space == "core":
            self._check_core()

    @classmethod
    def shared(cls) -> dict[str, str]:
        """The text of each parameter that the YAML file leaves out, for those that the method takes."""
        texts = texts_of(Parameters)
        if cls.needs or not cls.core:
            del texts["space"]
        elif isinstance(cls.core, str):
            texts["space"] += f"; it needs {cls.core}=true"
        return texts

    def _check_core(self) -> None:
        """ConfigError if the method cannot merge in the core space."""
        name, what = option_name("merge", type(self)), "merge.space=core merges task vectors of low rank"
        if self.needs:
            raise ConfigError(f"{what}, which merge={name} cannot measure on data; choose merge.space=full")
        if not self.core:
            raise ConfigError(f"{what}, and merge={name} does not merge task vectors; choose merge.space=full")
        if isinstance(self.core, str) and not getattr(self, self.core):
            raise ConfigError(f"{what}; set merge.{self.core}=true, or choose merge.space=full")

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if a parameter, or the number of experts, does not fit a suite with these tasks."""
        least, most = self.experts
        if len(tasks) < least or (most is not None and len(tasks) > most):
            some = f"at least {least}" if most is None else f"{least}" if most == least else f"{least} or {most}"
            raise ConfigError(
                f"merge={option_name('merge', type(self))} merges {some} experts and the suite has {len(tasks)}; "
                "change suite.tasks, or choose another merge"
            )
        for name, kind in parameters_of(type(self)).items():
            value: Any = getattr(self, name)
            kind.check_tasks(f"merge.{name}", value, tasks)
