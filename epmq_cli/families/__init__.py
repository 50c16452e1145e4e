"""Model architectures. A family is one module here with one object in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmq_cli.data.suite import Suite
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.bert import Bert
from epmq_cli.families.causal_lm import CausalLM
from epmq_cli.families.clip import Clip
from epmq_cli.families.deberta import Deberta
from epmq_cli.families.distilbert import DistilBert
from epmq_cli.families.family import Family
from epmq_cli.families.open_clip import OpenClip
from epmq_cli.families.refusal import MERGES
from epmq_cli.families.roberta import Roberta
from epmq_cli.families.t5 import T5
from epmq_cli.families.vit import Vit
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open_clip.registry import SCHEME
from epmq_cli.models.resolve import locate

FAMILIES: dict[str, Family] = {
    "bert": Bert(),
    "causal_lm": CausalLM(),
    "clip": Clip(),
    "deberta": Deberta(),
    "distilbert": DistilBert(),
    "open_clip": OpenClip(),
    "roberta": Roberta(),
    "t5": T5(),
    "vit": Vit(),
}
AUTO = "auto"


def family_of(name: str) -> Family:
    """The family of this name; ConfigError names the known ones."""
    if name not in FAMILIES:
        raise ConfigError(f"suite.family must be one of {', '.join([AUTO, *FAMILIES])}, got {name!r}")
    return FAMILIES[name]


def claiming(config: Mapping[str, Any]) -> Family:
    """The first family that takes models with such a config.json; ModelError where none does."""
    found = config.get("model_type")
    for family in FAMILIES.values():
        if found in family.model_types:
            return family
    known = sorted({kind for family in FAMILIES.values() for kind in family.model_types})
    raise ModelError(
        f"base: no family takes a model of type {found}, they take {', '.join(known)}; suite.family=causal_lm tries "
        f"other decoders, {MERGES}, and a new family is a module in epmq_cli/families with a subclass of Family"
    )


def suite_family(suite: Suite, checkpoint: Path | None = None) -> Family:
    """The family of a suite, by its name or, under `auto`, by the config.json of its base or of a checkpoint."""
    if suite.family != AUTO:
        return family_of(suite.family)
    if suite.base.startswith(SCHEME):
        return FAMILIES["open_clip"]
    role = "base" if checkpoint is None else "checkpoint"
    return claiming(ModelFolder(checkpoint or locate(suite.base, role, suite.root), role).config)
