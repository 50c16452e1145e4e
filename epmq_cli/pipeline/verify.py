"""Whether a checkpoint's tensors and scores are what epmq wrote; for its files see checkpoint/manifest.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from epmq_cli.checkpoint.expected_tensors import (
    ROLE,
    Wanted,
    described_model,
    finite,
    lacking_problems,
    layout_problem,
    name_problems,
    tie_problems,
    wanted_tensors,
)
from epmq_cli.checkpoint.task_heads import head_problems
from epmq_cli.checkpoint.write import RECORD, heads_file
from epmq_cli.config import instantiate, schema
from epmq_cli.errors import CheckpointError
from epmq_cli.families import AUTO, claiming, family_of
from epmq_cli.models.model_folder import SafetensorsFiles, read_json
from epmq_cli.pipeline import steps as steps
from epmq_cli.pipeline.reload import check_own, checkpoint_suite, read_record, ready, recorded_tasks
from epmq_cli.runtime.paths import read_regular

METRICS = "metrics.json"
STAGE = "quantized"
CLOSE = 1e-6  # relative: sums of floats depend on the number of threads


def tensor_problems(folder: Path) -> list[str]:
    """Where the tensors of a checkpoint are not those that its config.json describes, a phrase for each.

    A dense merge has the base's tensors under the base's names, some of which the model may not have: of those only
    the values are looked at.
    """
    files = SafetensorsFiles(folder, ROLE)
    model, found = described_model(folder, files), []
    wanted = wanted_tensors(folder, model, _signed(folder))
    if (folder / RECORD).is_file():
        found += name_problems(model, files, wanted)
    else:
        found += lacking_problems(folder, files)
        wanted = _renamed(wanted, files, str(getattr(model, "base_model_prefix", "")))
    ties = [problem for problem in tie_problems(folder, files) if not any(known in problem for known in found)]
    found += ties
    found += _problems(files, wanted)
    return found + _head_problems(folder, model.config)


def _head_problems(folder: Path, config: Any) -> list[str]:
    """Where the file of the heads does not hold those of the recorded tasks, by name and shape, or holds a NaN."""
    path = heads_file(folder)
    if not path.is_file() and not (folder / RECORD).is_file():
        return []
    found: list[str] = []
    where = path.relative_to(folder).as_posix()
    if (folder / RECORD).is_file():
        name, tasks = recorded_tasks(folder)
        family = claiming(read_json(folder, "config.json", ROLE)) if name == AUTO else family_of(name)
        if not path.is_file():
            return [] if family.heads == "none" else [f"{where} is missing"]
        found += head_problems(SafetensorsFiles(path, ROLE).infos, tasks, family, config)
    found += _problems(SafetensorsFiles(path, ROLE), {})
    return [f"{problem} ({where})" for problem in found]


def _signed(folder: Path) -> bool:
    """Whether scales may be negative: of all searches for scales only one chooses such (quantize/search.py)."""
    if read_json(folder, "config.json", ROLE).get("quantization_config") is None:
        return False
    return bool(read_record(folder)["config"]["quant"].get("grid") == "hessian")


def _renamed(wanted: Mapping[str, Wanted], files: SafetensorsFiles, prefix: str) -> dict[str, Wanted]:
    """What is known of stored tensors, whether they are stored with the prefix of the model's body or without."""
    found: dict[str, Wanted] = {}
    for stored in files.infos:
        spellings = (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
        known = next((wanted[name] for name in spellings if name in wanted), None)
        if known is not None:
            found[stored] = known
    return found


def _problems(files: SafetensorsFiles, wanted: Mapping[str, Wanted]) -> Iterator[str]:
    """Of each tensor the first problem, with one tensor in memory at a time."""
    for name, info in files.infos.items():
        check = wanted[name].check if name in wanted else finite
        if layout := layout_problem(name, info, wanted):
            yield layout
        elif problem := check(files.tensor(name)):
            yield f"{name} {problem}"


def score_problems(checkpoint: Path, device: torch.device, root: str | None) -> list[str]:
    """Where the scores of a checkpoint, measured again as its run did, are not those of the run's metrics.json, a
    phrase for each; CheckpointError where there is none. `root`: a mirror of the hub."""
    recorded, evaluation = _run_scores(checkpoint.resolve().parent / METRICS)
    suite = checkpoint_suite(checkpoint, None, root)
    family, model, tasks = ready(checkpoint, suite, evaluation, device)
    found = steps.stage_scores(evaluation, family, model, tasks, device, STAGE, checkpoint)[STAGE]
    names = dict.fromkeys([*recorded, *found])
    pairs = {name: (recorded.get(name), found.get(name)) for name in names}
    return [f"{name} scores {new}, {METRICS} has {old}" for name, (old, new) in pairs.items() if not _same(old, new)]


def _same(old: float | None, new: float | None) -> bool:
    return old is not None and new is not None and math.isclose(old, new, rel_tol=CLOSE)


def _run_scores(path: Path) -> tuple[dict[str, float], schema.Evaluation]:
    """The scores of a run's checkpoint by task, and how they were measured."""
    try:
        content = json.loads(read_regular(path))
        entry = dict(content["config"]["eval"])
        scores = {task: float(stages[STAGE]) for task, stages in content["scores"]["tasks"].items() if STAGE in stages}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no readable metrics.json of epmq run; give a checkpoint that is in its run folder, or leave "
            "out --scores"
        ) from error
    if not scores:
        raise CheckpointError(f"{path} has no scores of the stage {STAGE}; leave out --scores")
    check_own(path, entry, "score it with epmq eval")
    evaluation: schema.Evaluation = instantiate.build("eval", OmegaConf.create(entry))
    return scores, evaluation
