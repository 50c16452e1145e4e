"""The model class that transformers builds from a config, without weights: its tensors, and which of them are tied."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from epmq_cli.models.answers import cached_answer
from epmq_cli.models.model_folder import Tensors

TIE = "tie_word_embeddings"
PIECE = 1 << 22  # elements per comparison


@dataclass(frozen=True)
class ModelClass:
    """A model class, built from a config. All names are the names of the class.

    `tied`: copy -> source under this config. `tieable`: copy -> source if the config tied the embeddings. `outputs`:
    the tensors of the output layer. `tensors`: all parameters and buffers. `parameters`: the parameters only. `parts`:
    the top-level modules of the model and of its body. `prefix`: the name of the body. `ignored`: patterns of stored
    names that the class does not load. `renamings`: the rules by which transformers renames stored tensors.
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
        """The class's name for a stored tensor if transformers renames it, by one rule or by all in turn, otherwise the
        stored name."""
        if stored in self.tensors:
            return stored
        name, renamings = stored, self.renamings()
        for renaming in renamings:
            name = str(renaming.rename_source_key(name)[0])
        names = [*(str(renaming.rename_source_key(stored)[0]) for renaming in renamings), name]
        return next((name for name in names if name in self.tensors), stored)

    def ignores(self, name: str) -> bool:
        """Whether the class deliberately skips a stored tensor, such as a buffer from an old version."""
        return name not in self.tensors and any(re.search(pattern, name) for pattern in self.ignored)

    def lacking(self, stored: Collection[str]) -> list[str]:
        """The parameters that are missing from the stored tensors, sorted.

        Tied parameters and top-level modules without any stored tensor, such as heads, do not count as missing. The
        list is empty if the files use other names than the class.
        """
        own = {self._local(name) for name in stored if not self.ignores(name)}
        names = {self._local(name) for name in self.tensors}
        tops = {name.partition(".")[0] for name in own}
        if any(name not in names and name.partition(".")[0] in self.parts for name in own):
            return []
        ties = {*self.tieable, *self.tieable.values()}
        rest = [name for name in self._unstored(own) if name not in ties]
        return [name for name in rest if self._local(name).partition(".")[0] in tops]

    def foreign(self, stored: Collection[str]) -> set[str]:
        """The stored tensors of modules that the class does not have, under the class's own names.

        The set is empty if a parameter is missing under its own name, because a foreign tensor may be that parameter.
        """
        if self._unstored({self._local(name) for name in stored}):
            return set()
        return {name for name in stored if self._local(name).partition(".")[0] not in self.parts}

    def _unstored(self, own: Collection[str]) -> list[str]:
        ties = {*self.tied, *self.tied.values()}
        return sorted(name for name in self.parameters if name not in ties and self._local(name) not in own)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.")


def model_class(config: Mapping[str, Any], stored: Collection[str]) -> ModelClass | None:
    """The class that a config.json names, or the class of its model type that has the modules of the stored tensors.

    None if transformers has no such class.
    """
    tops = frozenset(name.partition(".")[0] for name in stored)
    return _model_class(json.dumps(config, sort_keys=True, default=str), tops)


@lru_cache(maxsize=32)
def _model_class(config: str, tops: frozenset[str]) -> ModelClass | None:
    """The class from the cache or from transformers. Its renamings are computed on first use: few models need them."""

    def ask() -> dict[str, Any] | None:
        described = _ask(config, tops)
        return None if described is None else _as_json(described)

    answer = cached_answer({"class of": config, "tops": sorted(tops)}, ask, __file__)
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
        for candidate in _classes(json.loads(config)):
            if tops <= candidate.parts:
                return candidate
            if best is None or len(tops & candidate.parts) > len(tops & best.parts):
                best = candidate
    return best


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of transformers while it builds models."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _classes(config: dict[str, Any]) -> Iterator[ModelClass]:
    """Yields the class that the config names, then the standard classes of its model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind, named = config.get("model_type"), config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for group in ("PRETRAINING", "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        standard = getattr(auto, f"MODEL_FOR_{group}_MAPPING_NAMES", {}).get(kind)
        names += [standard] if isinstance(standard, str) else []
    for name in dict.fromkeys(names):
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            described = _described(cls, config)
            if described is not None:
                yield described


def _described(cls: Any, config: dict[str, Any]) -> ModelClass | None:
    """Describes a class; None if it does not accept the config."""
    from epmq_cli.models.routed_experts import unpacked  # modules: imports torch

    settings = config_object(config)
    if settings is None:
        return None
    try:
        with torch.device("meta"):
            model = unpacked(cls(settings))
    except Exception:  # a config can contain anything, and the class may expect another config
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
        cls.__name__,
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
    """Yields the conversion rules that only rename tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    yield from (rule for rule in get_model_conversion_mapping(model) if type(rule) in (PrefixChange, WeightRenaming))


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
    """Builds the transformers config from a config.json, without its quantization; None if transformers rejects it."""
    from transformers import AutoConfig

    content = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        return AutoConfig.for_model(**content)
    except Exception:  # a config can contain anything
        return None


def untied_config(config: Mapping[str, Any], stored: Collection[str], own: Collection[str]) -> dict[str, Any] | None:
    """The changes to a config.json that untie these tensors.

    None if no setting unties them, or if the setting also changes something else.
    """
    nested = {key: {**value, TIE: False} for key, value in config.items() if isinstance(value, dict) and "_" in key}
    texts = {key: value for key, value in nested.items() if key in ("text_config", "decoder_config")}
    for changes in ({TIE: False}, {TIE: False, **texts}):
        changed = {**config, **changes}
        cls = model_class(changed, stored)
        if cls is not None and not set(own) & set(cls.tied) and _same_but_ties(config, changed):
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
    """Whether two stored tensors have equal values in the narrower of their types."""
    if len({tensors.infos[name].shape for tensors, name in (one, other)}) > 1:
        return False
    first, second = (tensors.tensor(name).flatten() for tensors, name in (one, other))
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    pieces = zip(torch.split(first, PIECE), torch.split(second, PIECE), strict=True)
    return all(torch.equal(a.to(narrow), b.to(narrow)) for a, b in pieces)
