"""The families of models: an architecture (one module here) times a task adapter (tasks/), listed in `FAMILIES`.

A new encoder is a module with one row, such as modernbert.py, and its entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmq_cli.data.suite import Suite
from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families.bart import BART
from epmq_cli.families.beit import BEIT
from epmq_cli.families.bert import BERT
from epmq_cli.families.causal_lm import CAUSAL_LM
from epmq_cli.families.clip import CLIP
from epmq_cli.families.deberta import DEBERTA
from epmq_cli.families.deit import DEIT
from epmq_cli.families.dinov2 import DINOV2
from epmq_cli.families.distilbert import DISTILBERT
from epmq_cli.families.electra import ELECTRA
from epmq_cli.families.family import Family
from epmq_cli.families.modernbert import MODERNBERT
from epmq_cli.families.mpnet import MPNET
from epmq_cli.families.open_clip import OpenClip
from epmq_cli.families.refusal import MERGES
from epmq_cli.families.roberta import ROBERTA
from epmq_cli.families.sentence import NAME, sentence_family
from epmq_cli.families.siglip import SIGLIP
from epmq_cli.families.swin import SWIN
from epmq_cli.families.t5 import T5_FAMILY
from epmq_cli.families.tasks.zero_shot import ZeroShot
from epmq_cli.families.vit import VIT
from epmq_cli.families.whisper import WHISPER
from epmq_cli.models.model_folder import ModelFolder, read_json
from epmq_cli.models.open_clip.config import SCHEME
from epmq_cli.models.resolve import locate
from epmq_cli.models.sentence_folder import LIST, is_sentence_folder, read_sentence_folder, transformer_folder

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(BART, BEIT, BERT, CAUSAL_LM, CLIP, DEBERTA, DEIT, DINOV2, DISTILBERT, ELECTRA, MODERNBERT, MPNET),
        Family(OpenClip(name="open_clip"), ZeroShot()),
        *(ROBERTA, SIGLIP, SWIN, T5_FAMILY, VIT, WHISPER),
    )
}
AUTO, SENTENCES = "auto", NAME


def family_of(name: str) -> Family:
    """The family of this name; ConfigError lists the known names."""
    if name not in FAMILIES:
        raise ConfigError(f"suite.family must be one of {', '.join([AUTO, *FAMILIES, SENTENCES])}, got {name!r}")
    return FAMILIES[name]


def claiming(config: Mapping[str, Any]) -> Family:
    """The first family that takes models with this config.json; ModelError if no family does."""
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    types = sorted({each for family in FAMILIES.values() for each in family.model_types})
    raise ModelError(
        f"base: no family takes models of type {kind}, the families take {', '.join(types)}; suite.family=causal_lm "
        f"tries other decoders, {MERGES}, and a new encoder is a row in epmq_cli/families, as in modernbert.py"
    )


def suite_family(suite: Suite, checkpoint: Path | None = None) -> Family:
    """The family of a suite: by its name or, for `auto`, by the config.json of its base or of a checkpoint. Text
    encoders whose experts are all folders of sentence-transformers embed sentences."""
    if suite.family not in (AUTO, SENTENCES):
        return family_of(suite.family)
    if suite.base.startswith(SCHEME):
        return FAMILIES["open_clip"]
    role = "base" if checkpoint is None else "checkpoint"
    place = checkpoint or locate(suite.base, role, suite.root)
    family = claiming(ModelFolder(transformer_folder(place, role), role).config)
    if suite.family == AUTO and (family.reads != "texts" or family.vocabulary):
        return family
    folders = {role: place} if checkpoint is not None else {role: place, **_expert_folders(suite)}
    own = [(name, folder) for name, folder in folders.items() if is_sentence_folder(folder)]
    if suite.family == AUTO and (not own or {*folders} - {"base"} - {name for name, _ in own}):
        return family
    if not own:
        raise ModelError(
            f"suite.family={SENTENCES} needs folders of sentence-transformers, which have a {LIST}; neither {place} "
            "nor an expert has one"
        )
    name, folder = own[0]
    return sentence_family(read_sentence_folder(folder, name), family)


def _expert_folders(suite: Suite) -> dict[str, Path]:
    """The folder or file of each expert, by its role; of a model with an adapter, that of the adapter."""
    found = {}
    for task in suite.members:
        role = f"expert of task {task.name}"
        parts = [task.expert] if Path(task.expert).exists() else task.expert.split("+", 1)
        found[role] = locate(parts[-1], role, suite.root)
    return found


def recorded_family(name: str, checkpoint: Path, role: str) -> Family:
    """The family of a checkpoint whose record has this name."""
    if is_sentence_folder(checkpoint):
        folder = read_sentence_folder(checkpoint, role)
        return sentence_family(folder, claiming(read_json(transformer_folder(checkpoint, role), "config.json", role)))
    return claiming(read_json(checkpoint, "config.json", role)) if name == AUTO else family_of(name)
