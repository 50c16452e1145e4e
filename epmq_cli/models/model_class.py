"""What transformers knows of the class of a model, without its weights: which tensors are tied, and which exist."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from epmq_cli.models.answers import kept_answer
from epmq_cli.models.model_folder import Tensors

TIE = "tie_word_embeddings"
PIECE = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class ModelClass:
    """The class of a model, as its config makes it. All names are those of the class.

    `tied`: copy -> source, as the config says. `tieable`: likewise, if it said that embeddings are tied. `outputs`: the
    tensors of the output layer. `tensors`: all parameters and buffers; `parameters`: the former alone. `parts`: the
    modules at the top of the model and of its body. `prefix`: the name of the body. `ignored`: patterns of stored names
    that the class does not load. `renamings`: those of transformers, which reads tensors of files under other names.
    """

    name: str
    tied: Mapping[str, str]
    tieable: Mapping[str, str]
    outputs: frozenset[str]
    tensors: frozenset[str]
    parameters: frozenset[str]
    parts: frozenset[str]
    prefix: str
    ignored: tuple[str, ...]
    renamings: Callable[[], tuple[Any, ...]] = tuple

    def own_name(self, stored: str) -> str:
        """What the class calls a stored tensor that transformers reads under another name; else the stored name."""
        if stored in self.tensors:
            return stored
        found = (str(renaming.rename_source_key(stored)[0]) for renaming in self.renamings())
        return next((name for name in found if name in self.tensors), stored)

    def ignores(self, name: str) -> bool:
        """Whether the class skips a stored tensor on purpose, such as a buffer that old versions stored."""
        return name not in self.tensors and any(re.search(pattern, name) for pattern in self.ignored)

    def lacking(self, stored: Collection[str]) -> list[str]:
        """The parameters that are not among stored tensors, in order. Not counted are tied ones, and modules at the top
        of which nothing is stored, such as heads; empty where files name tensors otherwise than the class."""
        own = {self._local(name) for name in stored if not self.ignores(name)}
        known = {self._local(name) for name in self.tensors}
        tops = {name.partition(".")[0] for name in own}
        if any(name not in known and name.partition(".")[0] in self.parts for name in own):
            return []
        ties = {*self.tieable, *self.tieable.values()}
        rest = [name for name in self._unstored(own) if name not in ties]
        return [name for name in rest if self._local(name).partition(".")[0] in tops]

    def foreign(self, stored: Collection[str]) -> set[str]:
        """The stored tensors, under the class's own names, of modules that the class has not; none where a parameter is
        not stored under the name that it has in the class, as these may be that parameter."""
        if self._unstored({self._local(name) for name in stored}):
            return set()
        return {name for name in stored if self._local(name).partition(".")[0] not in self.parts}

    def _unstored(self, own: Collection[str]) -> list[str]:
        ties = {*self.tied, *self.tied.values()}
        return sorted(name for name in self.parameters if name not in ties and self._local(name) not in own)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.")


def model_class(config: Mapping[str, Any], stored: Collection[str]) -> ModelClass | None:
    """The class that a config.json names, or the one of its model type that has the stored tensors' modules; None where
    transformers has no such class."""
    tops = frozenset(name.partition(".")[0] for name in stored)
    return _model_class(json.dumps(config, sort_keys=True, default=str), tops)


@lru_cache(maxsize=32)
def _model_class(config: str, tops: frozenset[str]) -> ModelClass | None:
    """The class as transformers described it, now or earlier; renamings, which few need, are asked for when needed."""

    def ask() -> dict[str, Any] | None:
        described = _ask(config, tops)
        return None if described is None else _as_json(described)

    answer = kept_answer({"class of": config, "tops": sorted(tops)}, ask, __file__)
    return None if answer is None else _from_json(answer, lambda: _renamings_of(config, tops))


def _as_json(described: ModelClass) -> dict[str, Any]:
    values = {field.name: getattr(described, field.name) for field in fields(described) if field.name != "renamings"}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}


def _from_json(answer: Mapping[str, Any], renamings: Callable[[], tuple[Any, ...]]) -> ModelClass:
    sets = {name: frozenset(answer[name]) for name in ("outputs", "tensors", "parameters", "parts")}
    return ModelClass(**{**answer, **sets, "ignored": tuple(answer["ignored"])}, renamings=renamings)


def _renamings_of(config: str, tops: frozenset[str]) -> tuple[Any, ...]:
    described = _ask(config, tops)
    return () if described is None else described.renamings()


@lru_cache(maxsize=32)
def _ask(config: str, tops: frozenset[str]) -> ModelClass | None:
    best: ModelClass | None = None
    with _quiet():
        for found in _classes(json.loads(config)):
            if tops <= found.parts:
                return found
            if best is None or len(tops & found.parts) > len(tops & best.parts):
                best = found
    return best


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing of what it makes here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _classes(config: dict[str, Any]) -> Iterator[ModelClass]:
    """The class that the config names, then the usual ones of its model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind, named = config.get("model_type"), config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for group in ("PRETRAINING", "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        found = getattr(auto, f"MODEL_FOR_{group}_MAPPING_NAMES", {}).get(kind)
        names += [found] if isinstance(found, str) else []
    for name in dict.fromkeys(names):
        made = getattr(transformers, name, None)
        if isinstance(made, type) and issubclass(made, transformers.PreTrainedModel):
            described = _described(made, config)
            if described is not None:
                yield described


def _described(made: Any, config: dict[str, Any]) -> ModelClass | None:
    """What a class says of itself; None where it does not take the config."""
    settings = config_object(config)
    if settings is None:
        return None
    try:
        with torch.device("meta"):
            model = made(settings)
    except Exception:  # a config may hold anything, and a class may be made for another one
        return None
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for part in (settings, *(getattr(settings, name, None) for name in getattr(settings, "sub_configs", ()))):
        if part is not None:
            setattr(part, TIE, True)
    try:
        tieable = dict(model.get_expanded_tied_weights_keys(all_submodels=True)) | tied
    except (AttributeError, ValueError):
        tieable = tied
    prefix = str(getattr(model, "base_model_prefix", ""))
    body = getattr(model, prefix, None) if prefix else None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = parameters | {name for name, _ in model.named_buffers(remove_duplicate=False)}
    renamings = tuple(_renamings(model))
    return ModelClass(
        made.__name__,
        tied,
        tieable,
        frozenset(_outputs(model)),
        frozenset(tensors),
        frozenset(parameters),
        frozenset(name.partition(".")[0] for part in (model, body) if part is not None for name in _names(part)),
        prefix,
        tuple(map(str, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())),
        lambda: renamings,
    )


def _renamings(model: Any) -> Iterator[Any]:
    """Those that keep each tensor as it is."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    yield from (found for found in get_model_conversion_mapping(model) if type(found) is WeightRenaming)


def _names(model: Any) -> Iterator[str]:
    yield from (name for name, _ in model.named_children())
    yield from (name for name, _ in model.named_parameters(recurse=False))
    yield from (name for name, _ in model.named_buffers(recurse=False))


def _outputs(model: Any) -> Iterator[str]:
    """The names of the output layer's tensors."""
    layer = model.get_output_embeddings()
    for name, module in model.named_modules():
        if layer is not None and module is layer:
            yield from (f"{name}.{part}" for part, _ in module.named_parameters(remove_duplicate=False))


def config_object(config: Mapping[str, Any]) -> Any:
    """The config of transformers that a config.json makes, without how the model is quantized; None where transformers
    has none."""
    from transformers import AutoConfig

    content = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        return AutoConfig.for_model(**content)
    except Exception:  # a config may hold anything
        return None


def untied_config(config: Mapping[str, Any], stored: Collection[str], own: Collection[str]) -> dict[str, Any] | None:
    """What changes in a config.json that says that these tensors are not tied; None where no setting says that, or only
    one that changes more than that."""
    nested = {key: {**value, TIE: False} for key, value in config.items() if isinstance(value, dict) and "_" in key}
    texts = {key: value for key, value in nested.items() if key in ("text_config", "decoder_config")}
    for changes in ({TIE: False}, {TIE: False, **texts}):
        changed = {**config, **changes}
        found = model_class(changed, stored)
        if found is not None and not set(own) & set(found.tied) and _same_but_ties(config, changed):
            return changes
    return None


def _same_but_ties(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, second = (_without_ties(config_object(config)) for config in (one, other))
    return bool(first == second)


def _without_ties(content: Any) -> Any:
    entries = content.to_dict() if hasattr(content, "to_dict") else content
    if isinstance(entries, dict):
        return {key: _without_ties(value) for key, value in entries.items() if key != TIE}
    return entries


def equal(one: tuple[Tensors, str], other: tuple[Tensors, str]) -> bool:
    """Whether two stored tensors have equal values, as the narrower of their types has them."""
    if len({tensors.infos[name].shape for tensors, name in (one, other)}) > 1:
        return False
    first, second = (tensors.tensor(name).flatten() for tensors, name in (one, other))
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    pieces = zip(torch.split(first, PIECE), torch.split(second, PIECE), strict=True)
    return all(torch.equal(a.to(narrow), b.to(narrow)) for a, b in pieces)
