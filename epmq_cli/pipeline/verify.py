"""Checks the tensors and scores of a checkpoint; store/manifest.py checks its files."""

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
    described_model,
    expected_tensors,
    lacking_problems,
    layout_problem,
    name_problems,
    tie_problems,
)
from epmq_cli.checkpoint.exporter import ExpectedTensor, finite
from epmq_cli.checkpoint.task_heads import head_problems
from epmq_cli.checkpoint.write import RECORD, heads_file
from epmq_cli.config import instantiate, schema
from epmq_cli.errors import CheckpointError
from epmq_cli.evaluate.score import Scorer
from epmq_cli.families import recorded_family
from epmq_cli.models.model_folder import SafetensorsFiles, Tensors, model_files, read_json
from epmq_cli.pipeline.reload import check_own, checkpoint_suite, read_record, ready, recorded_tasks
from epmq_cli.runtime.paths import read_regular

METRICS = "metrics.json"
STAGE = "quantized"
CLOSE = 1e-6  # relative: sums of floats depend on the number of threads


def tensor_problems(folder: Path) -> list[str]:
    """A phrase for each tensor of a checkpoint that does not match its config.json.

    A dense merge stores the base's tensors under the base's names. The model may lack some of them; for these, only the
    values are checked.
    """
    files = model_files(folder, ROLE)
    model = described_model(folder, files)
    expected = expected_tensors(folder, model, _signed(folder))
    if (folder / RECORD).is_file():
        problems = name_problems(model, files, expected)
    else:
        problems = lacking_problems(folder, files)
        expected = _renamed(expected, files, str(getattr(model, "base_model_prefix", "")))
    problems += [problem for problem in tie_problems(folder, files) if not any(other in problem for other in problems)]
    problems += _problems(files, expected)
    return problems + _head_problems(folder, model.config)


def _head_problems(folder: Path, config: Any) -> list[str]:
    """A phrase for each tensor in the file of the heads that does not belong to a recorded task, does not have the
    shape that the model's `config` implies, or contains NaN or infinity."""
    path = heads_file(folder)
    if not path.is_file() and not (folder / RECORD).is_file():
        return []
    problems: list[str] = []
    where = path.relative_to(folder).as_posix()
    if (folder / RECORD).is_file():
        name, tasks = recorded_tasks(folder)
        family = recorded_family(name, folder, ROLE)
        if not path.is_file():
            return [] if family.heads == "none" else [f"{where} is missing"]
        problems += head_problems(SafetensorsFiles(path, ROLE).infos, tasks, family, config)
    problems += _problems(SafetensorsFiles(path, ROLE), {})
    return [f"{problem} ({where})" for problem in problems]


def _signed(folder: Path) -> bool:
    """Whether scales may be negative. Only one scale search chooses negative scales (quantize/scale_search.py)."""
    if read_json(folder, "config.json", ROLE).get("quantization_config") is None:
        return False
    return bool(read_record(folder)["config"]["quant"].get("grid") == "hessian")


def _renamed(expected: Mapping[str, ExpectedTensor], files: Tensors, prefix: str) -> dict[str, ExpectedTensor]:
    """The expected tensors by stored name. A stored name may have the prefix of the model's body or lack it."""
    renamed: dict[str, ExpectedTensor] = {}
    for stored in files.infos:
        spellings = (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
        tensor = next((expected[name] for name in spellings if name in expected), None)
        if tensor is not None:
            renamed[stored] = tensor
    return renamed


def _problems(files: Tensors, expected: Mapping[str, ExpectedTensor]) -> Iterator[str]:
    """The first problem of each tensor. Only one tensor is in memory at a time."""
    for name, info in files.infos.items():
        check = expected[name].check if name in expected else finite
        if layout := layout_problem(name, info, expected):
            yield layout
        elif problem := check(files.tensor(name)):
            yield f"{name} {problem}"


def score_problems(checkpoint: Path, device: torch.device, root: str | None) -> list[str]:
    """Scores a checkpoint as its run did. Returns a phrase for each score that differs from the run's metrics.json.

    `root`: a mirror of the hub. Raises CheckpointError if the run's metrics.json is missing."""
    recorded, evaluation = _run_scores(checkpoint.resolve().parent / METRICS)
    suite = checkpoint_suite(checkpoint, None, root)
    family, model, tasks = ready(checkpoint, suite, evaluation, device)
    found = Scorer(evaluation, family, device).scores(model, tasks, STAGE, checkpoint)[STAGE]
    scores = {name: score.value for name, score in found.items()}
    names = dict.fromkeys([*recorded, *scores])
    pairs = {name: (recorded.get(name), scores.get(name)) for name in names}
    return [f"{name} scores {new}, {METRICS} has {old}" for name, (old, new) in pairs.items() if not _same(old, new)]


def _same(old: float | None, new: float | None) -> bool:
    return old is not None and new is not None and math.isclose(old, new, rel_tol=CLOSE)


def _run_scores(path: Path) -> tuple[dict[str, float], schema.Evaluation]:
    """The recorded scores of a checkpoint by task, and the evaluation that measured them."""
    try:
        content = json.loads(read_regular(path))
        entry = dict(content["config"]["eval"])
        scores = {task: float(stages[STAGE]) for task, stages in content["scores"]["tasks"].items() if STAGE in stages}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable metrics.json of epmq run; give a checkpoint inside its run folder, or omit "
            "--scores"
        ) from error
    if not scores:
        raise CheckpointError(f"{path} has no scores of the stage {STAGE}; omit --scores")
    check_own(path, entry, "score it with epmq eval")
    evaluation: schema.Evaluation = instantiate.build("eval", OmegaConf.create(entry))
    return scores, evaluation
