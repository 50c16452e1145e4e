"""Oracle: the config files themselves. Every key accepts the values that `TAKES` lists and refuses all others, in a
sentence that names the key and the value, before any model is opened; a new key accepts none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from epmq_cli.commands import run as command
from epmq_cli.config.instantiate import ELSEWHERE, conf_dir
from epmq_cli.errors import EpmqError, literal
from epmq_cli.merge.parameters import Number, PerExpert, PerTensor, Weight, parameters_of
from tests.helpers.counts import BAD, TRIED
from tests.helpers.hubs import CHOICES, option_node
from tests.helpers.tiers import slow

WRONG: dict[str, Any] = {
    "null": None,
    "list": [1, 2],
    "empty list": [],
    "mapping": {"a": 1},
    "empty mapping": {},
    "text": "nonsense",
    "empty text": "",
    "true": True,
    "minus": -1,
    "zero": 0,
    "fraction": 0.3,
    "huge": 10**30,
    "nan": float("nan"),
    "infinity": float("inf"),
}
QUICK = ["minus"]
ONE_LM = ["suite.base=shipped:none", "suite.experts={a: shipped:none}"]
GIVEN = {
    "eval/lm_eval": ["suite=causal_lm", "eval.tasks=[x]"],
    "quant/smoothquant": ["quant.bits=8", "quant.group_size=-1"],
    "pack/gptq": ["suite=causal_lm"],
    "pack/gguf": ["suite=causal_lm"],
    "merge/given": ["merge.path=x"],
    "suite/causal_lm": ONE_LM,
    "suite/seq_cls": [*ONE_LM, "suite.family=bert", "suite.tasks={a: {data: {name: cola, input: sentence}}}"],
    "suite/open_clip_vit_b32": ["suite.experts='{task}.pt'"],
}
"""The overrides that configs with ??? or a format of fixed bits need, by group and name."""
NUMBERS, TEXT_OR_NULL = ("zero", "fraction"), ("text", "null")
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("guidance.lam", "guidance.alpha", "guidance.beta", "guidance.rho"), NUMBERS),
    **dict.fromkeys(("quant.damping", "guidance.readout_weight", "guidance.prompt_weight"), ("fraction",)),
    **dict.fromkeys(
        (f"guidance.{name}" for name in ("intercepts", "norms", "embeddings", "readout", "safe")), ("true",)
    ),
    "guidance.weights": ("null", "empty mapping"),
    "quant.kv_cache": ("null",),
    **dict.fromkeys(("refine.features", "refine.anchor", "refine.warmup"), NUMBERS),
    **dict.fromkeys(("refine.temperature", "refine.lr", "refine.packed_lr"), ("fraction",)),
    **dict.fromkeys(("refine.epochs", "refine.packed_epochs"), ("zero",)),
    "refine.checkpointing": ("true",),
    "refine.hidden": NUMBERS,
    "refine.hidden_blocks": ("null", "list", "empty list"),
    **dict.fromkeys((f"refine.{name}_lr" for name in ("rounding", "scale", "norm", "bias")), NUMBERS),
    "refine.lam": NUMBERS,
    "refine.reach": ("fraction",),
    "refine.clip": ("list",),
    "refine.held_out": ("true",),
    "merge.slices": ("null",),
    "merge.path": ("text",),
    "quant.symmetric": ("true",),
    "quant.act_order": ("true",),
    "quant.group_size": ("minus", "huge"),  # the divisibility check needs the model
    "eval.samples": ("null",),
    "eval.stages": ("empty list",),
    "eval.shots": ("null", "zero"),
    "eval.chat_template": ("true",),
    "eval.server": ("null",),
    "eval.include_path": ("null",),
    "eval.round_inputs": ("true",),
    "group_size": ("minus", "huge"),
    "seed": ("zero",),
    "pack.open_clip": ("true",),
    "pack.engine": ("null",),
    "pack.damping": ("null", "zero", "fraction"),
    "quant.alpha": NUMBERS,
    "quant.clip": ("true",),
    "quant.clip_range": ("list",),
    **dict.fromkeys(("quant.rounding_lr", "quant.scale_lr"), NUMBERS),
    "quant.reach": ("fraction",),
    "quant.solve_scale": ("true",),
    "quant.lp_norm": ("fraction",),
    "quant.beta": ("fraction",),
    "quant.iterations": ("zero",),
    "budget": ("null",),
    "cache": ("null",),
    "data_root": TEXT_OR_NULL,
    **dict.fromkeys(("suite.name", "suite.base", "suite.tasks.*.expert", "suite.experts.*"), ("text",)),
    "suite.root": TEXT_OR_NULL,
    **dict.fromkeys(("suite.each.data", "suite.experts"), ("null",)),
    "suite.each": ("null", "empty mapping"),
    "suite.tasks": ("empty mapping",),  # valid if suite.experts names them
    "suite.tasks.*": ("null", "empty mapping"),  # valid if suite.each has their data
    "suite.tasks.*.data": ("empty mapping",),  # likewise
    "suite.tasks.*.classes": ("list",),
    "data.label": TEXT_OR_NULL,
    "data.labels": ("null", "list"),
    "data.name": TEXT_OR_NULL,
    "data.prompt": ("null",),
    "data.root": TEXT_OR_NULL,
    **dict.fromkeys(("data.path", "data.train", "data.test"), ("text",)),
    "data.input": TEXT_OR_NULL,
    "suite.each.packing": ("true",),
    "suite.each.assistant_only_loss": ("true",),
    "suite.each.documents": ("null",),
}
JOINT = ("guidance.prompt_weight", "pack.open_clip", "quant.iterations", "quant.group_size", "refine.distill.epochs")
"""Keys whose accepted values other options of some configs forbid."""
OTHERS = ("mergekit", "slices")  # merges that no run takes
FILES = [
    path
    for path in sorted(conf_dir().glob("*/*.yaml"))
    if path.parent.name not in ELSEWHERE and path.stem not in OTHERS
]
SUITES = ("tiny", "causal_lm", "seq_cls", "flan_t5_base_glue")  # together they have every key of suites
OPTIONS = [(path.parent.name, path.stem) for path in FILES if path.parent.name != "suite" or path.stem in SUITES]
TOP = (
    "bits",
    "budget",
    "group_size",
    "seed",
    "transform",
    "cache",
    "resume",
    "device",
    "data_root",
    "suite",
    "merge",
    "guidance",
    "refine",
    "calib",
    "quant",
    "pack",
    "eval",
)


@cache
def composed(group: str, name: str) -> DictConfig:
    """The config of a run with this option; of the built-in suite one task, since five take five times as long, or two
    for merges of at least two.

    The options of groups other than `suite` replace a node as Hydra would.
    """
    given = GIVEN.get(f"{group}/{name}", [])
    if group != "suite":
        option = option_node((conf_dir(),), group, name)
        least = getattr(hydra.utils.get_class(option._target_), "experts", (1, None))[0] if group == "merge" else 1
        cfg = _base("suite=causal_lm" in given, least).copy()
        OmegaConf.set_struct(cfg, False)
        cfg[group] = option
        cfg.merge_with_dotlist([text for text in given if text.startswith(f"{group}.")])
        OmegaConf.set_struct(cfg, True)
        return cfg
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("run", overrides=[f"suite={name}", *given, "out=x"])


@cache
def _base(causal_lm: bool, least: int) -> DictConfig:
    tasks = (f"~suite.tasks.{task}" for task in ("textures", "digits", "arrows", "counts")[least - 1 :])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(
            "run", overrides=[*(["suite=causal_lm", *ONE_LM] if causal_lm else tasks), "merge=average", "out=x"]
        )


def accepted(group: str, key: str, cfg: DictConfig) -> tuple[str, ...]:
    """The kinds of `WRONG` that a key accepts all the same; parameters of merge methods declare their ranges."""
    if group != "merge" or "." not in key:
        return TAKES.get(general(key), ())
    method = hydra.utils.get_class(cfg.merge._target_)
    kind = parameters_of(method).get(key.partition(".")[2])
    if kind is None:
        return TAKES.get(general(key), ("true",))  # flags have no range
    if not isinstance(kind, Number):
        return ()
    values = {name: value for name, value in WRONG.items() if type(value) in ((int,) if kind.integer else (int, float))}
    lowest = math.nextafter(kind.low, math.inf) if kind.open_low else kind.low
    taken = [name for name, value in values.items() if lowest <= value <= kind.high]
    taken += ["null"] * kind.null
    if isinstance(kind, PerTensor):
        taken += ["list"] * (kind.low <= 1 and kind.high >= 2)
    if isinstance(kind, PerExpert):
        taken += ["empty mapping"] * kind.partial
    return tuple(name for name in taken if (name, type(kind)) != ("zero", Weight))


def keys(node: DictConfig, where: str) -> Iterator[str]:
    """Every key below a node, at any depth; for the tasks of a suite, only the first one."""
    for name in list(node)[: 1 if where == "suite.tasks" else None]:
        if name != "_target_":
            yield f"{where}.{name}"
            below = node._get_node(name)
            if isinstance(below, DictConfig) and not below._is_none():
                yield from keys(below, f"{where}.{name}")


def general(key: str) -> str:
    """A key in the notation of `TAKES`."""
    parts = key.split(".")
    if "data" in parts[:-1]:
        return ".".join(parts[-2:])
    if parts[0] == "refine":
        return ".".join(["refine", *parts[-1:]])  # also of refine=both
    return ".".join("*" if i == 2 and parts[1] in ("tasks", "experts") else part for i, part in enumerate(parts))


class Stopped(BaseException):
    """Raised in place of reading data and opening models."""


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr("epmq_cli.pipeline.input_checks.check_inputs", stop)
    monkeypatch.setattr(command, "quiet_libraries", lambda: None)


def refusal(cfg: DictConfig, folder: Path) -> str | None:
    """The sentence that refuses a run of the config before its models are opened; None if the run gets there."""
    try:
        command.run(cfg, folder, [], CHOICES)
    except Stopped:
        return None
    except EpmqError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("the run ended")


def owner(node: DictConfig, key: str) -> str:
    """The class of the innermost part that holds a key of a group's node."""
    kind: str = node._target_
    for name in key.split(".")[1:-1]:
        node = node[name]
        kind = node.get("_target_", kind)
    return kind


def cases() -> Iterator[tuple[str, str, str]]:
    """Group, option and key. Options of one class share their keys, which are tried once."""
    seen = set()
    for group, name in OPTIONS:
        node = composed(group, name)[group]
        for key in keys(node, group):
            place = owner(node, key), general(key)
            if place not in seen or "data" in key:
                seen.add(place)
                yield group, name, key
    for key in TOP:
        yield "merge", "average", key


def test_the_table_has_every_key() -> None:
    assert {*TOP, "out"} == {str(name) for name in composed("merge", "average")}
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert {group for group, _ in OPTIONS} | {*ELSEWHERE, "hydra"} == folders
    tried = {general(key) for _, _, key in cases()}
    for path in (conf_dir() / "suite").glob("*.yaml"):
        given = OmegaConf.load(path)
        assert isinstance(given, DictConfig)
        assert {general(key) for key in keys(given, "suite")} <= tried | {"suite.defaults"}, path
    for path in (conf_dir() / "suite").glob("*/*.yaml"):
        task = OmegaConf.load(path)
        assert isinstance(task, DictConfig)
        assert {general(f"suite.tasks.x.{key[5:]}") for key in keys(task, "task")} <= tried, path


@pytest.mark.parametrize("kinds", [QUICK, slow([kind for kind in WRONG if kind not in QUICK])], ids=["quick", "rest"])
@pytest.mark.parametrize(("group", "name", "key"), list(cases()), ids=lambda part: part)
def test_every_key_refuses_invalid_values(
    group: str, name: str, key: str, kinds: Sequence[str], tmp_path: Path
) -> None:
    cfg = composed(group, name).copy()
    for kind in kinds:
        value = WRONG[kind]
        OmegaConf.update(cfg, key, value, merge=False)
        found, takes = refusal(cfg, tmp_path), accepted(group, key, cfg)
        if kind in takes:
            assert found is None or group == "suite" or key in JOINT, kind  # a suite may require other fields
            continue
        assert found is not None, f"{key}={value} is taken"
        TRIED[BAD] += 1
        assert key.rpartition(".")[2] in found
        if not isinstance(value, (dict, list)):
            assert literal(value) in found or (value is None and " no " in found)


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=lambda part: part)
def test_every_group_refuses_unknown_keys(group: str, name: str, tmp_path: Path) -> None:
    config = composed(group, name)
    places = [
        key for key in [group, *keys(config[group], group)] if isinstance(OmegaConf.select(config, key), DictConfig)
    ]
    for place in places:
        if general(place) in ("suite.tasks", "suite.experts"):  # their keys are names
            continue
        cfg = config.copy()
        OmegaConf.update(cfg, f"{place}.densty", 1, force_add=True)
        assert f"{place} has no option 'densty', the options are" in (refusal(cfg, tmp_path) or "")
        TRIED[BAD] += 1


@pytest.mark.parametrize("key", [*TOP, "out"])
def test_every_top_level_key_is_required_and_no_other_is_allowed(key: str, tmp_path: Path) -> None:
    cfg = composed("merge", "average").copy()
    OmegaConf.set_struct(cfg, False)
    del cfg[key]
    assert f"the config needs {key}, but only " in (refusal(cfg, tmp_path) or "")
    cfg[f"{key}s"] = 1
    assert f"the config has no option '{key}s', the options are suite, merge," in (refusal(cfg, tmp_path) or "")
    TRIED[BAD] += 2
