"""Opens the models of a suite and checks that they can be merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.suite import Suite
from epmq_cli.errors import ModelError
from epmq_cli.families.family import Family
from epmq_cli.merge.leftovers import (
    check_added,
    foreign,
    left_out,
    skip_added,
    skip_foreign,
    skip_ignored,
    take_common,
)
from epmq_cli.merge.merged_heads import MergedHeads, settle_heads
from epmq_cli.merge.named_tensors import NamedTensors
from epmq_cli.merge.source import GIVEN, SHOWN, MergeSource
from epmq_cli.merge.tied_weights import Member, Ties, are_plain, ask_classes, resolve_ties
from epmq_cli.merge.token_rows import TokenRows
from epmq_cli.models.merged_tokenizer import MergedTokenizer
from epmq_cli.models.model_class import TIE, model_class
from epmq_cli.models.model_folder import Completed, ModelFolder
from epmq_cli.models.resolve import locate
from epmq_cli.models.rotation import rotated
from epmq_cli.models.tokenizers import check_tokens
from epmq_cli.models.wrappers import merged_names, misfit, refuse_wrapped, unwrap
from epmq_cli.runtime.console import log, plain, say

if TYPE_CHECKING:
    from torch import nn

ASIDE = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")


class SuiteModels:
    """The opened models of a suite and a common view of their tensors (`source`).

    `whole`: merges all tensors that base and experts share, as `epmq merge` does, not only those that the family
    names. `given`: the folder of a merge that exists already. `transform`: hadamard rotates all models.
    `ties`: the tied tensors that stay tied. `rewritten`: whether tensors of the base differ from those in its files.
    """

    def __init__(
        self, suite: Suite, family: Family, whole: bool = False, given: str | None = None, transform: str = "none"
    ) -> None:
        root = suite.root
        self.base = open_member(family, suite.base, "base", root, None)
        refuse_wrapped(self.base)
        base = _member(family, self.base)
        self.experts = {
            task.name: _fitted(
                family, open_member(family, task.expert, f"expert of task {task.name}", root, self.base), base
            )
            for task in suite.members
        }
        if given is not None:
            self.experts[GIVEN] = _fitted(family, open_member(family, given, "given merge", root, self.base), base)
        folded = {name: family.folded(own) for name, own in self.experts.items()}
        own_base, self.base, self.experts = self.base, family.folded(self.base), folded
        self.rewritten = transform != "none" or self.base is not own_base
        if self.rewritten:
            base = _member(family, self.base)
        if transform != "none":
            self.base = rotated(self.base, family.value_heads(self.base))
            self.experts = {name: rotated(own, family.value_heads(own)) for name, own in self.experts.items()}
            base = _member(family, self.base)
        experts = {task: _member(family, expert) for task, expert in self.experts.items()}
        if not whole and (further := family.trained_beside(self.base, self.experts, suite.members)):
            self.experts = {task: completed(expert, self.base, further) for task, expert in self.experts.items()}
            experts = {task: _member(family, expert) for task, expert in self.experts.items()}
            for member in (base, *experts.values()):
                member.merged |= {name: name for name in further}
        self.ties = _resolve(family, base, experts, whole)
        if transform != "none" and self.base.config.get(TIE) is False:
            self.ties = replace(self.ties, changes={**self.ties.changes, TIE: False})
        if whole:
            _check_complete(base)
        misfits = {
            task: misfit(expert.folder, self.base, base.merged, family.tensor_names)
            for task, expert in experts.items()
            if not {*base.merged} <= {*expert.merged}
        }
        named = {task: NamedTensors(self.experts[task], expert.merged) for task, expert in experts.items()}
        self.tokenizer, rows = None, None
        if (option := suite.merged_tokenizer) is not None:
            self.tokenizer = MergedTokenizer(
                self.base, {task.name: self.experts[task.name] for task in suite.members}, option
            )
            rows = TokenRows(self.tokenizer.vocabulary, self.tokenizer.size, self.tokenizer.owned, option.tokens)
            moved = self.tokenizer.moved(self.base.config)
            self.ties = replace(self.ties, changes={**self.ties.changes, **moved})
        self.source = MergeSource(
            NamedTensors(self.base, base.merged), named, suite.vocabulary, self.ties.written, misfits, rows
        )
        if family.reads != "pictures" and self.tokenizer is None:
            processors = {task.name: task.processor for task in suite.members}
            check_tokens(self.base, {task: self.experts[task] for task in processors}, processors)
        for expert in self.experts.values():
            if _described(expert) != _described(self.base):
                _check_settings(expert, family.settings(expert), self.base, family.settings(self.base))


def _member(family: Family, folder: ModelFolder) -> Member:
    merged = family.tensor_names(folder)  # refuses other architectures
    return Member(folder, family.all_names(folder), merged)


def _fitted(family: Family, expert: ModelFolder, base: Member) -> ModelFolder:
    """The expert under the base's names, without the segments of wrappers. It may lack tables that can be tied."""
    targets = {*base.merged}
    if not targets <= {*merged_names(expert, family.tensor_names)}:
        ask_classes(family, [base])
        targets -= {*base.tieable, *base.tieable.values(), *foreign(base)}
        targets -= {name for name in targets if name.startswith(family.added)}
    return unwrap(expert, base.folder, targets, family.tensor_names)


def _resolve(family: Family, base: Member, experts: Mapping[str, Member], whole: bool) -> Ties:
    """Resolves tied tensors, task heads and unmerged tensors, and warns about each tensor that is left out. Sets the
    merged tensors of all members to those of the result."""
    if not (whole and are_plain(base, experts)):
        ask_classes(family, [base, *experts.values()])
        skip_ignored(base, experts)
    heads = MergedHeads()
    if whole:
        skip_added(family, base, experts)
        take_common(family, base, experts)
        heads = settle_heads(family, base, experts)
    else:
        check_added(family, base, experts)
    strange = skip_foreign(base, experts, whole)
    if strange:
        log.warning(plain(_strange(base, strange)))
    ties = resolve_ties(family, base, experts)
    if ties.message:
        say(ties.message)
    if whole or family.heads != "made":
        for sentence in left_out(family, base, experts):
            log.warning(plain(sentence))
    dropped, changes = ties.dropped | heads.dropped | strange, {**ties.changes, **heads.changes}
    return replace(ties, dropped=dropped, changes=changes)


def _strange(base: Member, stored: Collection[str]) -> str:
    names = sorted(stored)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    assert base.own_class is not None
    return (
        f"base: {', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'} left out, because "
        f"{base.own_class.name} has no module for {'it' if len(names) == 1 else 'them'}"
    )


def _check_complete(base: Member) -> None:
    """Raises ModelError if the base lacks a tensor of its class, which transformers would fill with random numbers."""
    cls = base.own_class or model_class(base.folder.config, base.folder.infos)
    lacking = cls.lacking(base.folder.infos) if cls is not None else []
    if cls is not None and lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ModelError(
            f"base: {base.folder.path / 'config.json'} describes a {cls.name} with {lacking[0]}{more}, which its "
            "files do not have; fetch it again"
        )


def _described(folder: ModelFolder) -> dict[str, Any]:
    """The part of a config that describes the model. If it is equal in two models, so are all settings, and
    the slow import of transformers, which fills in the defaults, is not needed."""
    return {name: value for name, value in folder.config.items() if name not in ASIDE}


def _check_settings(expert: ModelFolder, settings: dict[str, Any], base: ModelFolder, expected: dict[str, Any]) -> None:
    for name, value in settings.items():
        if value != expected[name]:
            raise ModelError(
                f"{expert.role} ({expert.path}) was not fine-tuned from the base ({base.path}): "
                f"{name} is {value} in its config and {expected[name]} in the base's"
            )


def open_member(family: Family, source: str, role: str, root: str | None, base: ModelFolder | None) -> ModelFolder:
    """One model; `base` is None for the base itself. `model+adapter` is an adapter of a model that is not the base."""
    model, plus, adapter = source.partition("+")
    if plus and adapter and not Path(source).exists():
        return _adapted(family, open_member(family, model, role, root, base), adapter, role, root)
    opened = family.open(locate(source, role, root), role, base)
    path = opened.path
    if opened.config is not getattr(base, "config", None) and "quantization_config" in opened.config:
        raise ModelError(f"{role}: {path} is quantized already; give the original model")
    return opened


def _adapted(family: Family, model: ModelFolder, adapter: str, role: str, root: str | None) -> ModelFolder:
    """A model with an adapter merged in, with the model's own config and processor files."""
    opened = family.open(locate(adapter, role, root), role, model)
    return ModelFolder(model.path, role, model.config, opened.source)


def completed(expert: ModelFolder, base: ModelFolder, names: Collection[str]) -> ModelFolder:
    """An expert with the base's tensors for those of these names that it lacks."""
    return ModelFolder(expert.path, expert.role, expert.config, Completed(expert, base, names))


def written_dtype(source: MergeSource, option: str) -> torch.dtype:
    """The type of the result for `pack.dtype`; for `auto`, the type of most of the base's merged elements."""
    if option != "auto":
        dtype: torch.dtype = getattr(torch, option)
        return dtype
    own, wider = source.main_dtype, source.wider
    if wider:
        narrow, wide = (str(dtype).removeprefix("torch.") for dtype in (own, max(wider.values(), key=_width)))
        say(
            f"the experts of {', '.join(wider)} are stored in {wide}, the result in {narrow} as the base is; "
            f"pack.dtype={wide} keeps their precision"
        )
    return own


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def fit_source(model: nn.Module, models: SuiteModels) -> nn.Module:
    """The base model in the shape of the result: untied copies get their own memory, and tables get the rows of
    the suite's largest vocabulary, filled with the base's rows of `source`."""
    listed: Any = getattr(model, "get_expanded_tied_weights_keys", lambda all_submodels: {})
    own = [copy for copy, source in listed(all_submodels=True).items() if not _shared(model, copy, source)]
    own += [copy for copy in models.ties.untied if copy not in own and copy in model.state_dict()]
    _untie(model, own)
    source = models.source
    if source.vocabulary_size is not None:
        resized: Any = model
        resized.resize_token_embeddings(source.vocabulary_size, mean_resizing=False)
        _untie(model, own)  # resizing ties them again
        tensors = model.state_dict()
        with torch.no_grad():
            for name in source.padded:
                tensors[name].copy_(source.base(name))
    return model


def _shared(model: nn.Module, one: str, other: str) -> bool:
    return model.get_parameter(one).data_ptr() == model.get_parameter(other).data_ptr()


def _untie(model: nn.Module, names: list[str]) -> None:
    """Gives each of these tensors its own memory."""
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    for name in names:
        module, _, local = name.rpartition(".")
        tensor = model.get_parameter(name)
        parameter = torch.nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
        setattr(model.get_submodule(module), local, parameter)
        if ties is not None:
            ties.pop(name, None)
