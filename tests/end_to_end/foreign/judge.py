"""Runs epmq on the folders of a user and judges the result: correct, refused, or silently wrong."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from epmq_cli.commands.merge import merge
from epmq_cli.commands.run import run
from epmq_cli.config.instantiate import conf_dir
from epmq_cli.errors import EpmqError
from epmq_cli.pipeline import verify
from epmq_cli.store.manifest import file_problems
from tests.end_to_end.foreign.forms import copies, read
from tests.end_to_end.foreign.kinds import Kind, model, outputs, quiet

TAKEN, REFUSED, WRONG = "taken", "refused", "silently wrong"
BARRED, CRASHED, UNSAID = "refused though legitimate", "ended as a defect", "right without a word"
NOTHING_SAID = "nothing was said"
CLOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 2e-3)}
"""Relative and absolute tolerance, by the coarsest type of the inputs."""
CHOICES = {"suite": "foreign", "merge": "average", "guidance": "merged", "quant": "none"}
QUICK = ("group_size=-1", "device=cpu", "calib.samples=4", "calib.batch_size=4", "cache=false", "merge=average")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a combination, and the reason."""

    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class CommandResult:
    """The results of a command: its checkpoint, its messages, and its metrics.json."""

    checkpoint: Path
    said: str
    metrics: Mapping[str, Any]


@cache
def _config(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, overrides=["suite=tiny", "out=unused", *overrides])


def run_merge(suite: Mapping[str, Any], folder: Path) -> CommandResult:
    """The results of `epmq merge merge=average` on a suite."""
    return _run_command(suite, folder, _config("merge", "merge=average"), lambda cfg: merge(cfg, folder, []))


def run_unquantized(suite: Mapping[str, Any], folder: Path, *overrides: str) -> CommandResult:
    """The results of `epmq run` without quantization on a suite."""
    cfg = _config("run", *QUICK, "quant=none", "guidance=merged", *overrides)
    return _run_command(suite, folder, cfg, lambda cfg: run(cfg, folder, [], CHOICES))


def _run_command(
    suite: Mapping[str, Any], folder: Path, cfg: DictConfig, command: Callable[[DictConfig], None]
) -> CommandResult:
    own: Any = OmegaConf.create(OmegaConf.to_container(cfg))
    own.suite = dict(suite)
    folder.mkdir(parents=True)
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("epmq")
    log.addHandler(handler)
    level, log.level = log.level, logging.INFO
    try:
        command(own)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return CommandResult(folder / "checkpoint", "\n".join(said), json.loads((folder / "metrics.json").read_text()))


def judge(attempt: Callable[[Path], Iterable[str]], folder: Path, may_be_refused: str | None) -> Verdict:
    """The verdict on an attempt, which writes to a folder and returns everything that is wrong with the result."""
    try:
        problems = list(attempt(folder))
    except EpmqError as error:
        return _refusal(str(error), folder, may_be_refused)
    except Exception as error:  # users see any other exception as a defect of epmq
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(CRASHED, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    if not problems:
        return Verdict(TAKEN)
    only_unsaid = all(problem.startswith(NOTHING_SAID) for problem in problems)
    return Verdict(UNSAID if only_unsaid else WRONG, "; ".join(problems))


def _refusal(sentence: str, folder: Path, may_be_refused: str | None) -> Verdict:
    left = [name for name in ("checkpoint", "metrics.json") if (folder / name).exists()]
    if left or "\n" in sentence or not sentence:
        return Verdict(CRASHED, f"refused, but {left or 'not in one sentence'}: {sentence}")
    return Verdict(REFUSED if may_be_refused else BARRED, sentence)


def loaded(kind: Kind, checkpoint: Path) -> Any:
    """The merged part of a checkpoint, loaded by transformers in float32. AssertionError if tensors are missing,
    which transformers would initialize at random."""
    whole = model(kind.name, "base")
    body = kind.has_labels
    cls = type(getattr(whole, kind.body.rstrip("."))) if body else type(whole)
    options = {"add_pooling_layer": False} if kind.name in ("roberta", "vit") else {}
    with quiet():
        found, info = cls.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    assert not missing, f"transformers finds no {missing[0]} in the checkpoint"
    return found.eval().vision_model if kind.name == "clip" else found.eval()


def problems(
    kind: Kind,
    made: CommandResult,
    wanted: Mapping[str, Tensor],
    answers: Tensor,
    dtype: torch.dtype,
    said: str | None = None,
) -> list[str]:
    """Everything that is wrong with a checkpoint: parameters or outputs that differ, problems that `epmq verify`
    names, and a missing message `said`."""
    try:
        own = loaded(kind, made.checkpoint)
    except AssertionError as error:
        return [str(error)]
    except Exception as error:
        return [f"transformers does not load the checkpoint: {type(error).__name__}: {error}"]
    parameters = dict(own.requires_grad_(False).named_parameters(remove_duplicate=False))
    found = _differing(parameters, wanted, dtype)
    found += _differing_outputs(outputs(kind, own), answers, dtype) + _stale_copies(kind, made.checkpoint)
    found += [f"verify: {problem}" for problem in _verify_problems(made.checkpoint)]
    if said is not None and said not in made.said:
        found.append(f"{NOTHING_SAID} of {said}")
    return found


def _differing(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    if odd := sorted(set(own) ^ set(wanted)):
        return [f"{odd[0]} is {'unknown' if odd[0] in own else 'lacking'}"]
    relative, absolute = CLOSE[dtype]
    off = {
        name: float((tensor.float() - wanted[name].float()).abs().max())
        for name, tensor in own.items()
        if not torch.allclose(tensor.float(), wanted[name].float(), rtol=relative, atol=absolute)
    }
    worst = sorted(off, key=lambda name: -off[name])
    return [f"{len(off)} tensors differ, {worst[0]} by {off[worst[0]]:.3g}"] if off else []


def _differing_outputs(own: Tensor, wanted: Tensor, dtype: torch.dtype) -> list[str]:
    off = float((own - wanted).abs().max() / wanted.abs().max())
    bound = 1e-4 if dtype is torch.float32 else 0.2  # for a model with rounded weights
    return [f"what it says is off by {off:.3g} of the largest"] if not off <= bound else []


def _stale_copies(kind: Kind, checkpoint: Path) -> list[str]:
    """Tied copies in the checkpoint's files outside the merged part, in the head of the pretrained encoder, that
    differ from the table."""
    tensors = read(checkpoint)
    spelled = {name if name.startswith(kind.body) else kind.body + name: tensor for name, tensor in tensors.items()}
    pairs = copies(kind, tensors).items() if kind.has_labels else ()
    return [
        f"{copy} is not a copy of {source}"
        for copy, source in pairs
        if copy in tensors and source in spelled and not torch.equal(tensors[copy], spelled[source])
    ]


def _verify_problems(checkpoint: Path) -> list[str]:
    found = file_problems(checkpoint)
    with quiet():
        return found or verify.tensor_problems(checkpoint)
