"""Writes the folders of a user for a combination, with the expected results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.end_to_end.foreign.adapters import trained
from tests.end_to_end.foreign.combinations import Combination
from tests.end_to_end.foreign.forms import Form, bfloat16, compose, float16, mixed, plain, read, saved
from tests.end_to_end.foreign.kinds import KINDS, Kind, body_of, model, outputs, part
from tests.end_to_end.foreign.savings import SAVINGS, roles
from tests.end_to_end.foreign.wrappers import WRAPPERS

CASTS: tuple[Form, ...] = (bfloat16, float16, mixed)


@dataclass(frozen=True)
class Expert:
    """The path that a suite names, and the same model in transformers: its merged part by name, and its outputs for
    `inputs`. `dtype`: the coarsest type that it is stored in."""

    path: Path
    parameters: Mapping[str, Tensor]
    outputs: Tensor
    dtype: torch.dtype


def base_of(combination: Combination, place: Path, store: Path) -> Path:
    """The base of a combination, in `place` unless it is stored exactly as transformers saves it."""
    kind, saving = KINDS[combination.kind], SAVINGS[combination.saving]
    template = saved(kind, "base", saving.base_role or roles(kind)[0], store)
    if saving.base is plain and saving.base_layout is SAVINGS["plain"].base_layout:
        return template
    return saving.base_layout.write(place / "base", saving.base(kind, read(template)), template)


def expert_of(
    combination: Combination, base: Path, place: Path, store: Path, which: str = "a", base_form: Form | None = None
) -> Expert:
    """An expert of a combination, in `place`. `base_form`: how the base is saved, if it differs from the
    combination."""
    kind, saving = KINDS[combination.kind], SAVINGS[combination.saving]
    place.mkdir(parents=True, exist_ok=True)
    if combination.adapter != "none":
        return _adapted(kind, combination.adapter, base, place, which, _cast(base_form or saving.base))
    template = saved(kind, which, saving.role or roles(kind)[1], store)
    form = compose(saving.expert, WRAPPERS[combination.wrapper].form)
    path = saving.layout.write(place / f"expert-{which}", form(kind, read(template)), template)
    whole = model(kind.name, which)
    cast = _cast(saving.expert)
    parameters = {name: tensor.float() for name, tensor in cast(kind, part(kind, whole)).items()}
    return Expert(path, parameters, outputs(kind, body_of(kind, whole)), dtype_of(saving.expert))


def _adapted(kind: Kind, name: str, base: Path, place: Path, which: str, cast: Form) -> Expert:
    made = trained(kind, name, base, place / f"adapter-{which}", which, cast)
    body = made.model if kind.name == "clip" else body_of(kind, made.model)
    return Expert(made.path, _parameters(kind, made.model), outputs(kind, body), torch.float32)


def _parameters(kind: Kind, made: Any) -> dict[str, Tensor]:
    """The merged part of the adapted model; for CLIP the tower alone."""
    if kind.name != "clip":
        return part(kind, made)
    return {name: tensor.detach() for name, tensor in made.named_parameters(remove_duplicate=False)}


def _cast(form: Form) -> Form:
    return form if form in CASTS else plain


def dtype_of(form: Form) -> torch.dtype:
    """The coarsest type that a form stores."""
    return torch.bfloat16 if form in (bfloat16, mixed) else torch.float16 if form is float16 else torch.float32


def suite(kind: Kind, base: Path, experts: Mapping[str, Path], data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The suite of a user. By default its data are never read."""
    source = data or {
        "_target_": "epmq_cli.data.documents.Documents" if kind.is_decoder else "epmq_cli.data.table.Table",
        "train": "train.jsonl",
        "test": "test.jsonl",
    }
    fields: dict[str, Any] = {"data": dict(source), "max_length": 16}
    fields |= {"metric": "perplexity"} if kind.is_decoder else {}
    fields |= {"classes": ["good", "bad"]} if kind.family in ("t5", "clip") else {}
    fields |= {"templates": ["a photo of a {}"]} if kind.family == "clip" else {}
    tasks = {task: {"expert": str(path), **fields} for task, path in experts.items()}
    return {
        "_target_": "epmq_cli.data.suite.Suite",
        "name": "foreign",
        "family": kind.family,
        "base": str(base),
        "tasks": tasks,
    }
