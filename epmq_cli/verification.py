"""Whether a checkpoint's tensors and scores are what epmq wrote; for its files see checkpoint/manifest.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from epmq_cli import config
from epmq_cli import pipeline as steps
from epmq_cli.checkpoint.manifest import read_regular
from epmq_cli.checkpoint.pack import HEADS, RECORD
from epmq_cli.checkpoint.reader import SafetensorsFiles, read_json
from epmq_cli.checkpoint.unpack import grid_of
from epmq_cli.errors import CheckpointError
from epmq_cli.families import AUTO, claiming, family_of
from epmq_cli.heads import head_problems
from epmq_cli.inference.load import blank_model, model_config
from epmq_cli.quantize.grid import GridSpec
from epmq_cli.recorded import check_own, checkpoint_suite, read_record, ready, recorded_tasks

METRICS = "metrics.json"
STAGE = "quantized"
CLOSE = 1e-6  # relative: sums of floats depend on the number of threads
ROLE = "checkpoint"


def finite(tensor: Tensor) -> str | None:
    """What is wrong with the values of any tensor; None where nothing is."""
    return "holds NaN or infinity" if tensor.is_floating_point() and not tensor.isfinite().all() else None


def signed_scale(tensor: Tensor) -> str | None:
    """Likewise, of scales of either sign."""
    return finite(tensor) or (None if (tensor != 0).all() else "holds scales of 0")


def positive_scale(tensor: Tensor) -> str | None:
    """Likewise, of scales above 0."""
    return finite(tensor) or (None if (tensor > 0).all() else "holds scales that are not above 0")


def equal_to(values: list[int], tensor: Tensor) -> str | None:
    """Likewise, of a tensor whose values are known."""
    return None if tensor.tolist() == values else f"is {tensor.tolist()}, config.json implies {values}"


@dataclass(frozen=True)
class Wanted:
    """What a tensor must be: its shape, the safetensors name of its type (None for any), and a check of its values."""

    shape: tuple[int, ...]
    dtype: str | None = None
    check: Callable[[Tensor], str | None] = finite


def tensor_problems(folder: Path) -> list[str]:
    """Where the tensors of a checkpoint are not those that its config.json describes, a phrase for each.

    A dense merge has the base's tensors under the base's names, some of which the model may not have: of those only
    the values are looked at.
    """
    files = SafetensorsFiles(folder, ROLE)
    model = _model(folder, files)
    wanted, found = _wanted(folder, model), []
    if (folder / RECORD).is_file():
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        found += [f"{name} is missing" for name in wanted if name not in files.infos and name not in tied]
        found += [f"{name} is no tensor of the model" for name in files.infos if name not in wanted]
    else:
        wanted = _renamed(wanted, files, str(getattr(model, "base_model_prefix", "")))
    found += _problems(files, wanted)
    return found + _head_problems(folder, model.config)


def _head_problems(folder: Path, config: Any) -> list[str]:
    """Where heads.safetensors does not hold the heads of the recorded tasks, by name and shape, or holds a NaN."""
    if not (folder / HEADS).is_file() and not (folder / RECORD).is_file():
        return []
    found: list[str] = []
    if (folder / RECORD).is_file():
        name, tasks = recorded_tasks(folder)
        family = claiming(read_json(folder, "config.json", ROLE)) if name == AUTO else family_of(name)
        if not (folder / HEADS).is_file():
            return [] if family.heads == "none" else [f"{HEADS} is missing"]
        found += head_problems(SafetensorsFiles(folder / HEADS, ROLE).infos, tasks, family, config)
    found += _problems(SafetensorsFiles(folder / HEADS, ROLE), {})
    return [f"{problem} ({HEADS})" for problem in found]


def _model(folder: Path, files: SafetensorsFiles) -> nn.Module:
    """The model that config.json describes, without memory for its tensors."""
    settings = model_config(folder, files)
    try:
        with torch.device("meta"):
            return blank_model(folder, settings, files)
    except CheckpointError:
        raise
    except Exception as error:  # a config may hold anything, and transformers checks little of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder / 'config.json'} describes no model that transformers can make ({reason}); fetch it again"
        ) from error


def _wanted(folder: Path, model: nn.Module) -> dict[str, Wanted]:
    """Every tensor of the model, packed where config.json says so."""
    wanted = {name: Wanted(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    quantization = read_json(folder, "config.json", ROLE).get("quantization_config")
    if quantization is None:
        return wanted
    # of all searches for scales only this one may choose negative ones (quantize/search.py)
    signed = read_record(folder)["config"]["quant"].get("grid") == "hessian"
    for name, module in model.named_modules():
        spec = grid_of(folder, quantization, name) if isinstance(module, nn.Linear) else None
        if spec is not None:
            rows, columns = wanted.pop(f"{name}.weight").shape
            wanted |= {f"{name}.{part}": want for part, want in _packed(rows, columns, spec, signed).items()}
    return wanted


def _packed(rows: int, columns: int, spec: GridSpec, signed: bool) -> dict[str, Wanted]:
    """The tensors that stand for a weight (rows, columns)."""
    groups = math.ceil(columns / spec.columns(columns))
    scale = signed_scale if signed and spec.symmetric else positive_scale
    found = {
        "weight_packed": Wanted((rows, _words(columns, spec.bits)), "I32"),
        "weight_scale": Wanted((rows, groups), check=scale),
        "weight_shape": Wanted((2,), "I64", partial(equal_to, [rows, columns])),
    }
    if not spec.symmetric:
        found["weight_zero_point"] = Wanted((_words(rows, spec.bits), groups), "I32")
    return found


def _words(count: int, bits: int) -> int:
    """How many int32 so many integers are packed into by `pack_to_int32`, which would take memory for them."""
    return -(-count * bits // 32)


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
        want = wanted.get(name, Wanted(info.shape))
        if info.shape != want.shape:
            yield f"{name} is {list(info.shape)}, config.json implies {list(want.shape)}"
        elif want.dtype not in (None, info.dtype):
            yield f"{name} is of type {info.dtype}, config.json implies {want.dtype}"
        elif problem := want.check(files.tensor(name)):
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


def _run_scores(path: Path) -> tuple[dict[str, float], config.Evaluation]:
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
    evaluation: config.Evaluation = config.build("eval", OmegaConf.create(entry))
    return scores, evaluation
