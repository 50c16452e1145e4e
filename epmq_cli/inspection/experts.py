"""Compares experts with their base, with the checks of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.suite import Suite
from epmq_cli.errors import EpmqError
from epmq_cli.families import suite_family
from epmq_cli.families.family import Family
from epmq_cli.inspection.content import SHOWN, roles_content, totals
from epmq_cli.inspection.roles import roles_by_family
from epmq_cli.inspection.task_vectors import task_vector_content
from epmq_cli.merge.suite_models import ASIDE, SuiteModels
from epmq_cli.models.headers import TensorInfo
from epmq_cli.models.lora.adapter import Adapted
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.processor_folder import processor_files, same_files

Sources = tuple[str, list[str], str | None]
"""The base, the experts, and a mirror of the hub."""


@dataclass(frozen=True)
class NoData:
    """A source without samples, for suites whose data is not read."""

    def load(self, split: Split, labels: bool = True) -> Samples:
        """No samples."""
        return Samples([])


def experts_content(sources: Sources, family: str, vocabulary: str, density: float | None) -> dict[str, Any]:
    """What a run would do with these experts. `density`: of TIES; None to read no tensors."""
    base, paths, root = sources
    experts = named(paths)
    suite = _suite(base, experts, family, vocabulary, root)
    chosen = suite_family(suite)
    content: dict[str, Any] = {"base": base, "experts": experts, "family": chosen.name}
    try:
        models = SuiteModels(suite, chosen)
    except EpmqError as error:
        return content | {"refused": _each(suite, chosen, experts) or [str(error)]}
    folders = {task: models.experts[task] for task in experts}
    content |= {
        "models": {name: totals(_stored(folder)) for name, folder in {"base": models.base, **folders}.items()},
        "configs": config_differences(models.base, folders),
        "processors": {name: _processor(models.base, folder, chosen.reads) for name, folder in folders.items()},
        **_roles(chosen, models),
        "refused": [],
    }
    if density is not None:
        content["task_vectors"], problems = task_vector_content(models.source, density)
        content["refused"] += problems
    return content


def named(paths: list[str]) -> dict[str, str]:
    """A short, unique name for each path."""
    names = [Path(path.rstrip("/")).stem or path for path in paths]
    names = [
        "_".join([Path(path).parent.name, name]) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    return {
        name if names.count(name) == 1 else f"{name}_{index}": path
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    }


def _suite(base: str, experts: Mapping[str, str], family: str, vocabulary: str, root: str | None) -> Suite:
    tasks = {name: {"expert": path, "data": NoData()} for name, path in experts.items()}
    return Suite("inspect", family, base, tasks, vocabulary=vocabulary, root=root)


def _each(suite: Suite, family: Family, experts: Mapping[str, str]) -> list[str]:
    """The reason for which each expert alone is refused."""
    sentences = []
    for name, path in experts.items():
        try:
            SuiteModels(_suite(suite.base, {name: path}, suite.family, suite.vocabulary, suite.root), family)
        except EpmqError as error:
            sentences.append(str(error))
    return list(dict.fromkeys(sentences))


def _stored(folder: ModelFolder) -> Iterable[TensorInfo]:
    """The tensors of a model's own files."""
    source = folder.source
    return (source.stored if isinstance(source, Adapted) else folder.infos).values()


def config_differences(base: ModelFolder, experts: Mapping[str, ModelFolder]) -> dict[str, dict[str, Any]]:
    """The keys of config.json that differ between base and experts, with each one's value; None where it lacks the
    key. Names of classes, versions and what training notes (`problem_type`) are left out."""
    configs = {"base": base.config, **{name: expert.config for name, expert in experts.items()}}
    kinds = {expert.config.get("model_type") for expert in experts.values()}
    parts = [part for part in base.config.values() if isinstance(part, dict) and kinds == {part.get("model_type")}]
    if parts and kinds != {base.config.get("model_type")}:  # experts that are a part of the base
        configs["base"] = parts[0]
    keys = [key for config in configs.values() for key in config if key not in (*ASIDE, "problem_type")]
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in dict.fromkeys(keys)}
    return {key: own for key, own in values.items() if any(value != own["base"] for value in own.values())}


def _processor(base: ModelFolder, expert: ModelFolder, reads: str) -> str:
    """What an expert's tokenizer or image processor files are, beside the base's."""
    own, others = (processor_files(folder.path, reads) for folder in (expert, base))
    if not own or expert.path == base.path:
        return "none of its own: the base's is used"
    if same_files(own, others):
        return "the same files as the base"
    names = [name for name in own if name not in others or own[name].read_bytes() != others[name].read_bytes()]
    names += [f"{name} (missing)" for name in others if name not in own]
    return f"other files than the base: {', '.join(names[:SHOWN])}"


def _roles(family: Family, models: SuiteModels) -> dict[str, Any]:
    """What a run does with the base's tensors, and the experts' heads."""
    base, source = models.base, models.source
    merged = {name: source.read_name(name) for name in source.names}
    roles = roles_by_family(family, base, merged)
    heads = {
        name: sum(info.elements for stored, info in folder.infos.items() if family.in_head(family.spelling(stored)))
        for name, folder in models.experts.items()
    }
    return {**roles_content(base.infos, roles), "heads_of_experts": heads}
