"""Merges whose result has other layers than the models: computes each slice of `slices.py` on its own.

A slice gets its own source: the tensors of its layers under their names in the result, and the tensors in front of the
layers (first slice) or behind them (last slice). The base of a slice without a base is its first expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from typing import TYPE_CHECKING, Any

from epmq_cli.errors import ConfigError
from epmq_cli.merge.engine import CPU, LazyMerge
from epmq_cli.merge.layer_counts import with_layers
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.settings import LAYER, layer_depths
from epmq_cli.merge.slices import Range, Slice
from epmq_cli.merge.source import MergeSource
from epmq_cli.merge.suite_models import SuiteModels
from epmq_cli.models.model_folder import ModelFolder, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MakeMerge = Callable[[], LazyMerge]


@dataclass(frozen=True)
class Place:
    """A tensor of the result: the slice that merges it, by its number, its depth, and its name in each model."""

    part: int
    depth: float
    names: Mapping[str | None, str]


class StackedSource(MergeSource):
    """The result's tensors, in the form of a source; `parts`: the slice's source by tensor name."""

    def __init__(self, base: NamedTensors, parts: Mapping[str, MergeSource], vocabulary_size: int | None) -> None:
        super().__init__(base, {})
        self._parts, self._size = parts, vocabulary_size

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the merged tensor."""
        return self._parts[name].shape(name)

    @property
    def wider(self) -> dict[str, torch.dtype]:
        """See MergeSource."""
        return {task: dtype for part in self._parts.values() for task, dtype in part.wider.items()}

    @property
    def vocabulary_size(self) -> int | None:
        """See MergeSource."""
        return self._size


class StackedMerge(LazyMerge):
    """The merged tensors of all slices, computed on access. `merges`: returns that of a tensor's slice, by name."""

    def __init__(self, source: StackedSource, merges: Mapping[str, MakeMerge], dtype: torch.dtype) -> None:
        self.source, self.dtype, self._merges = source, dtype, merges

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name, rounded to a type, in that type."""
        return self._merges[name]().stored(name, dtype)


def stacked(
    models: SuiteModels, modules: Mapping[str, list[Slice]], dtype: torch.dtype, device: torch.device | str = CPU
) -> tuple[SuiteModels, StackedMerge]:
    """The models with a base that has the layers of the result, and their merge, rounded to `dtype`; `ties.changes`
    then include the changes to config.json. The methods are fitted when the first tensor is read.

    ConfigError if a slice names layers or modules that the models do not have.
    """
    source = models.source
    counts = _stacks(source.names)
    by_stack = _by_stack(modules, counts)
    slices = [part for stack in counts for part in by_stack[stack]]
    places = _places(source.names, counts, by_stack, slices)
    config = models.base.config
    for stack, count in counts.items():
        config = with_layers(config, stack, count, _origins(by_stack[stack], count))
    sources: dict[str, MergeSource] = {}
    merges: dict[str, MakeMerge] = {}
    for number, part in enumerate(slices):
        own = {name: place for name, place in places.items() if place.part == number}
        made = _source(source, part, own)
        sources |= dict.fromkeys(own, made)
        merges |= dict.fromkeys(own, once(partial(LazyMerge, made, part.method, dtype, device=device)))
    base = _base(models, counts, by_stack, places, config)
    result = copy.copy(models)
    result.base = base
    changed = {key: value for key, value in config.items() if value != models.base.config.get(key)}
    result.ties = replace(models.ties, changes={**changed, **models.ties.changes})
    stored = {name: _stored_name(source, name, place) for name, place in places.items()}
    result.source = StackedSource(NamedTensors(base, stored), sources, source.vocabulary_size)
    return result, StackedMerge(result.source, merges, dtype)


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """The layers of each stack, by the prefix of their names."""
    counts: dict[str, int] = {}
    for name in names:
        if match := LAYER.match(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _by_stack(modules: Mapping[str, list[Slice]], counts: Mapping[str, int]) -> dict[str, list[Slice]]:
    """The slices of each stack. A module is named by a part of the stack's prefix."""
    found: dict[str, list[Slice]] = {}
    for module, parts in modules.items():
        fitting = [stack for stack in counts if not module or module in stack]
        fitting = list(counts) if len(counts) == 1 and module in ("", "default") else fitting
        if len(fitting) != 1 or fitting[0] in found:
            raise ConfigError(
                f"merge.slices must name a part of one of the model's stacks of layers ({', '.join(counts) or 'none'}) "
                f"for each of them, got {module or 'a list without names'}"
            )
        found[fitting[0]] = parts
    if lacking := [stack for stack in counts if stack not in found]:
        raise ConfigError(f"merge.slices must have slices for {', '.join(lacking)} too; give all layers to keep them")
    for stack, parts in found.items():
        for part in parts:
            for layers in part.ranges:
                if layers is not None and layers[1] > counts[stack]:
                    raise ConfigError(
                        f"merge.slices takes layers {layers[0]} to {layers[1] - 1} of {stack}, and the models have "
                        f"{counts[stack]}"
                    )
    return found


def _range(layers: Range, count: int) -> range:
    return range(count) if layers is None else range(*layers)


def _origins(parts: list[Slice], count: int) -> list[int]:
    """For each layer of the result, the number of the layer in its slice's first model."""
    return [index for part in parts for index in _range(part.ranges[0], count)]


def _members(part: Slice) -> dict[str | None, Range]:
    """The layers of the models that a slice reads, by task, the base's under None."""
    members: dict[str | None, Range] = {None: part.base} if part.reads_base else {}
    members.update(part.layers.items())
    return members


def _places(
    names: list[str], counts: Mapping[str, int], by_stack: Mapping[str, list[Slice]], slices: list[Slice]
) -> dict[str, Place]:
    """The tensors of the result in order, and where they come from."""
    depths = layer_depths(names)
    layers: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if match := LAYER.match(name):
            layers.setdefault((match[1], int(match[2])), []).append(name[match.end() :])
    places: dict[str, Place] = {}
    done = set()
    for name in names:
        match = LAYER.match(name)
        if match is None:
            part = _around(name, depths[name], by_stack)
            members = _members(part)
            places[name] = Place(_index(slices, part), depths[name], dict.fromkeys(members, name))
        elif match[1] not in done:
            done.add(match[1])
            places |= _layers(match[1], layers, counts[match[1]], by_stack[match[1]], slices)
    return places


def _layers(
    stack: str, layers: Mapping[tuple[str, int], list[str]], count: int, parts: list[Slice], slices: list[Slice]
) -> dict[str, Place]:
    places, first = {}, 0
    lone = _lone(stack, layers, count)
    for part in parts:
        ranges = {task: _range(own, count) for task, own in _members(part).items()}
        origins = next(iter(ranges.values()))
        for index, origin in enumerate(origins):
            number = first + index
            depth = index / (len(origins) - 1) if len(origins) > 1 else 1.0
            rests = [rest for rest in layers[stack, origin] if rest not in lone]
            if (number == 0) != (origin == 0) and _differs(layers, stack, lone):
                raise ConfigError(
                    f"merge.slices must begin with layer 0 of {stack} and use it nowhere else, because it has other "
                    "tensors than the other layers"
                )
            for rest in rests:
                own = {task: f"{stack}.{numbers[index]}.{rest}" for task, numbers in ranges.items()}
                places[f"{stack}.{number}.{rest}"] = Place(_index(slices, part), depth, own)
            for rest in lone if number == 0 else ():
                name = f"{stack}.0.{rest}"
                places[name] = Place(_index(slices, part), depth, dict.fromkeys(ranges, name))
        first += len(origins)
    return places


def _lone(stack: str, layers: Mapping[tuple[str, int], list[str]], count: int) -> list[str]:
    """The tensors that only the first layer of a stack has, such as T5's position biases. They stay there."""
    others = {rest for index in range(1, count) for rest in layers[stack, index]}
    return [rest for rest in layers[stack, 0] if count > 1 and rest not in others]


def _differs(layers: Mapping[tuple[str, int], list[str]], stack: str, lone: list[str]) -> bool:
    """Whether the first layer of a stack lacks tensors that the second one has."""
    return {*layers[stack, 0]} - {*lone} != {*layers.get((stack, 1), layers[stack, 0])} - {*lone}


def _index(slices: list[Slice], part: Slice) -> int:
    return next(index for index, each in enumerate(slices) if each is part)


def _around(name: str, depth: float, by_stack: Mapping[str, list[Slice]]) -> Slice:
    """The slice of a tensor outside the layers: the first or the last one of the stack with the most similar prefix."""

    def shared(stack: str) -> int:
        pairs = zip(name.split("."), stack.split("."), strict=False)
        return next((index for index, (one, other) in enumerate(pairs) if one != other), 9)

    stack = max(by_stack, key=shared)
    return by_stack[stack][0 if depth == 0 else -1]


def _source(source: MergeSource, part: Slice, places: Mapping[str, Place]) -> MergeSource:
    role = None if part.reads_base else next(iter(part.layers))
    members = [role, *part.layers]
    names = {task: {name: place.names[task] for name, place in places.items()} for task in members}
    depths = {name: place.depth for name, place in places.items()}
    return source.renamed(names[role], {task: names[task] for task in part.layers}, role, depths)


def _stored_name(source: MergeSource, name: str, place: Place) -> str:
    """The name of a tensor in the result's files: that of the base's layer with another number."""
    stored = source.stored_name(next(iter(place.names.values())))
    match, own = LAYER.match(name), LAYER.match(stored)
    return stored if match is None or own is None else f"{own[1]}.{match[2]}.{stored[own.end() :]}"


class Restacked:
    """The base's files with the layers of the result: name -> the folder and stored name of the values."""

    def __init__(self, tensors: Mapping[str, tuple[ModelFolder, str]]) -> None:
        self._tensors = tensors
        self.infos: dict[str, TensorInfo] = {name: folder.infos[own] for name, (folder, own) in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of this stored name."""
        folder, own = self._tensors[name]
        return folder.tensor(own)


def _base(
    models: SuiteModels,
    counts: Mapping[str, int],
    by_stack: Mapping[str, list[Slice]],
    places: Mapping[str, Place],
    config: dict[str, Any],
) -> ModelFolder:
    source, base = models.source, models.base
    tensors: dict[str, tuple[ModelFolder, str]] = {}
    merged = {source.read_name(name) for name in source.names}
    for stored in base.infos:  # tensors that are not merged, such as buffers
        match = LAYER.match(stored)
        stack = next((stack for stack in counts if match and match[1].endswith(stack)), None)
        if stored in merged:
            continue
        if match is None or stack is None:
            tensors[stored] = (base, stored)
            continue
        for number, origin in enumerate(_origins(by_stack[stack], counts[stack])):
            if origin == int(match[2]):
                tensors[f"{match[1]}.{number}.{stored[match.end() :]}"] = (base, stored)
    for name, place in places.items():
        own = next(iter(place.names.values()))
        tensors[_stored_name(source, name, place)] = (base, source.read_name(own))
    return ModelFolder(base.path, base.role, config, Restacked(tensors))
