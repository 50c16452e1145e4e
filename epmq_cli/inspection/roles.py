"""What a run does with each tensor of a model: quantizes it, merges it, or leaves it as it is.

The family of the model answers, from the header alone. The answer depends on the architecture and not on the size, so
it is cached by the names of the tensors without their layer numbers: asking the family imports torch, which takes
seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmq_cli.errors import ModelError
from epmq_cli.models.answers import cached_answer
from epmq_cli.models.headers import TensorInfo
from epmq_cli.store.hashing import content, hash_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_cli.families.family import Family
    from epmq_cli.models.model_folder import ModelFolder

PARTS = ("embeddings", "blocks", "norms", "readout", "heads", "others")
QUANTIZED, MERGED, HEAD, LEFT = "quantized", "merged", "task head", "left"
TREATMENTS = (QUANTIZED, MERGED, HEAD, LEFT)
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Roles = dict[str, tuple[str, str]]
"""Stored name -> part and treatment."""


class HeaderTensors:
    """Tensors by their headers."""

    def __init__(self, infos: dict[str, TensorInfo], role: str) -> None:
        self.infos, self._role = infos, role

    def tensor(self, name: str) -> Tensor:
        """Raises ModelError."""
        raise ModelError(f"{self._role}: {name} is not on this machine; download the model first")


def roles_of(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], path: Path) -> tuple[str, Roles]:
    """The family of a model and the role of each tensor. Raises ModelError if no family takes the model."""
    own = _patterns(infos)
    patterns = {own[name]: len(info.shape) for name, info in infos.items()}
    described = {key: config.get(key) for key in ("model_type", "architectures", "tie_word_embeddings")}
    question = {"roles": patterns, "of": described, "by": _families_code()}
    family, by_pattern = cached_answer(question, lambda: _ask(dict(config), dict(infos), path), __file__)
    return family, {name: tuple(by_pattern[own[name]]) for name in infos}


def _patterns(names: Collection[str]) -> dict[str, str]:
    """Names without their layer numbers, by name. Layers with other tensors than the first have other patterns, such as
    those that attend to pictures."""
    layers: dict[str, set[str]] = {}
    for name in names:
        if number := NUMBER.search(name):
            layers.setdefault(name[: number.end()], set()).add(NUMBER.sub("*", name[number.end() :]))
    kinds: dict[str, list[set[str]]] = {}
    for layer, tensors in layers.items():
        known = kinds.setdefault(layer.rpartition(".")[0], [])
        known += [] if tensors in known else [tensors]
    patterns = {}
    for name in names:
        number = NUMBER.search(name)
        layer = name[: number.end()] if number else ""
        kind = kinds[layer.rpartition(".")[0]].index(layers[layer]) if layer else 0
        patterns[name] = NUMBER.sub("*", name).replace("*", f"*{kind or ''}", 1)
    return patterns


@cache
def _families_code() -> str:
    """A hash of the code that answers."""
    folder = Path(__file__).parents[1]
    files = sorted([*(folder / "families").rglob("*.py"), Path(__file__).with_name("skeleton.py")])
    return hash_json([content(file).sha256 for file in files])


def _ask(config: dict[str, Any], infos: dict[str, TensorInfo], path: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    from epmq_cli.families import claiming
    from epmq_cli.models.model_folder import ModelFolder

    family = claiming(config)
    folder = ModelFolder(path, "base", config, HeaderTensors(infos, "base"))
    own, patterns = roles_by_family(family, folder, family.tensor_names(folder)), _patterns(infos)
    return family.name, {patterns[name]: role for name, role in own.items()}


def roles_by_family(
    family: Family,
    folder: ModelFolder,
    merged: Mapping[str, str],
) -> Roles:
    """The role of each tensor of a model. `merged`: those that are merged, name -> stored name."""
    names, infos = family.all_names(folder), folder.infos
    model = _model(family, folder, names)
    places = dict(_places(family, model))
    quantized = {f"{block.name(name)}.weight" for block in family.blocks(model) for name in block.linears}
    blocks = tuple(f"{block.prefix}." for block in family.blocks(model))
    roles: Roles = {}
    for name, stored in names.items():
        if family.in_head(name) and name not in merged:
            roles[stored] = ("heads", HEAD)
            continue
        part = places.get(name.rpartition(".")[0]) or places.get(name) or _guessed(name, infos[stored], blocks)
        treatment = LEFT if name not in merged else QUANTIZED if name in quantized else MERGED
        roles[stored] = (part, treatment)
    return roles


def _model(family: Family, folder: ModelFolder, names: Mapping[str, str]) -> nn.Module:
    """The modules of a model: from its header, or from transformers if some have no tensors, as the norms of OLMo."""
    from epmq_cli.inspection.skeleton import skeleton

    shapes = {name: folder.infos[stored].shape for name, stored in names.items()}
    made = skeleton(shapes, json.loads(json.dumps(folder.config)))
    try:
        family.blocks(made)
    except ModelError:
        if not (folder.path / "config.json").is_file():
            raise
        return family.load(folder.path, weights=False)
    return made


def _places(family: Family, model: Any) -> Iterator[tuple[str, str]]:
    """The part of each module that a step of the family names."""
    from epmq_cli.families.structure import Linears, Table

    for stack in family.stacks(model):
        for section in stack.sections:
            for step in section.steps:
                if isinstance(step, Linears):
                    part = "readout" if section is stack.readout else "blocks"
                    yield from ((section.name(name), part) for name in step.names)
                else:
                    yield section.name(step.name), "norms"
        if stack.first_norm:
            yield stack.first_norm, "norms"
        for stem in stack.stem:
            modules = (stem.name,) if isinstance(stem, Table) else (stem.convolution, stem.positions, stem.class_token)
            yield from ((name, "embeddings") for name in modules if name)


def _guessed(name: str, info: TensorInfo, blocks: tuple[str, ...]) -> str:
    """The part of a tensor that no step names."""
    if name.startswith(blocks):
        return "norms" if len(info.shape) < 2 and "norm" in name.lower() else "blocks"
    if "lm_head" in name or ("projection" in name.rpartition(".")[0].rpartition(".")[2] and "embed" not in name):
        return "readout"  # not the patch convolution of ViT, embeddings.patch_embeddings.projection
    return "embeddings" if "embed" in name and not name.startswith("text_model.") else "others"
