"""Oracles: mergekit's documentation of its files, options written by hand, and for five files of public style the
formulas of the methods on the models' tensors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from epmq_cli.cli import start
from epmq_cli.commands.mergekit import replaced, typed
from epmq_cli.config.instantiate import build, conf_dir
from epmq_cli.errors import ConfigError
from epmq_cli.merge.dare import DareLinear
from epmq_cli.merge.mergekit import Mergekit, merge_options, mergekit_options
from epmq_cli.merge.mergekit_file import PARAMETERS, checked, read_mergekit
from epmq_cli.merge.mergekit_options import OURS, method_options, setting, suite_options, task_names
from epmq_cli.merge.slices import Slice

FILES = Path(__file__).parent / "mergekit"
TWO = [{"model": "org/math"}, {"model": "org/code"}]


def content(method: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "org/base", "models": TWO, **keys}


def options(text: dict[str, Any]) -> dict[str, Any]:
    file = checked(text)
    return method_options(file, file.parts[""][0])


def weighted(*weights: Any) -> list[dict[str, Any]]:
    return [{**model, "parameters": {"weight": own}} for model, own in zip(TWO, weights, strict=True)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            content("task_arithmetic", models=weighted(0.5, [0, 1, 0]), parameters={"lambda": 0.7}),
            {"merge": "task_arithmetic", "merge.scale": 0.7, "merge.weights": {"math": 0.5, "code": [0, 1, 0]}},
        ),
        (
            content("task_arithmetic", parameters={"weight": 1, "normalize": True}),
            {"merge": "task_arithmetic", "merge.scale": 1.0, "merge.weights": {"math": 0.5, "code": 0.5}},
        ),
        (
            content("dare_ties", models=weighted(0.5, 0.2), parameters={"density": [{"filter": "mlp", "value": 0.5}]}),
            {
                "merge": "dare_ties",
                "merge.scale": 1.0,
                "merge.combine": "sum",
                "merge.density": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
                "merge.weights": {"math": 0.5, "code": 0.2},
            },
        ),
        (
            content("dare_ties", parameters={"weight": 0.3, "density": 0.5, "normalize": True}),
            {"merge": "dare_ties", "merge.scale": 1.0, "merge.combine": "mean", "merge.density": 0.5},
        ),
    ],
)
def test_parameters_become_options(text: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert options(text) == wanted


def test_a_models_rules_come_before_those_of_the_file() -> None:
    own, shared = [{"filter": "mlp", "value": 0.1}], [{"filter": "attn", "value": 0.2}, {"value": 0.3}]
    assert setting("x", [own, shared, 0.9], 1.0) == [*own, *shared]
    assert setting("x", [own, None, 0.9], 1.0) == [*own, {"value": 0.9}]
    assert setting("x", [own], 1.0) == [*own, {"value": 1.0}]
    assert setting("x", [None], 1.0) == 1.0


def test_a_gradient_keeps_its_first_value_outside_the_layers() -> None:
    """mergekit reads a gradient at its start for all tensors outside the layers."""
    assert setting("x", [[0, 1]], 1.0) == [{"layers": False, "value": 0}, {"value": [0, 1]}]
    assert setting("x", [[0, 1, 0]], 1.0) == [0, 1, 0]
    norms = {"filter": "norm", "value": [2, 3]}
    assert setting("x", [[norms, {"value": 1}]], 1.0) == [{**norms, "layers": False, "value": 2}, norms, {"value": 1}]


def test_names_of_tasks() -> None:
    models = ["org/Math-7B", "other/Math-7B", "folder/1.5B/", "org/base+my/code-lora", "org/base@v1.0"]
    assert list(task_names(models).values()) == ["Math_7B", "Math_7B_2", "m1_5B", "code_lora", "base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (content("tise"), "merge_method must be one of linear, task_arithmetic, .*, got 'tise'"),
        (content("ties", dtpe="x"), r"has no option 'dtpe', .*; did you mean dtype\?"),
        (content("ties", parameters={"densty": 0.5}), r"parameters has no option 'densty', .*; did you mean density\?"),
        (content("slerp", parameters={"weight": 0.5}), r"parameters has no option 'weight', the options are t"),
        (content("ties", models=[{"model": "a", "paramters": {}}]), r"models\[0\] has no option 'paramters'"),
        (content("ties", slices=[]), "the file gives no weight for org/math, and mergekit has no default"),
        (content("ties", models=[{"model": "a"}, {"model": "a"}]), "models must name each model once, got a twice"),
        ({"merge_method": "ties", "models": TWO}, "merge_method=ties needs base_model"),
        (
            {"merge_method": "linear", "models": TWO, "slices": [{}]},
            "one of models, slices and modules, got models and",
        ),
        (content("passthrough"), "merge_method=passthrough takes one model, or one per slice; models has 2"),
        (content("ties", dtype="int8"), "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (content("ties", parameters={"weight": "much"}), "parameters.weight must be a number, a list of numbers or"),
        (
            content("ties", parameters={"weight": [{"filter": "mlp", "value": 1}]}),
            "weight must end with a rule without",
        ),
        (
            content("dare_linear", parameters={"weight": 1, "rescale": False}),
            "rescale=False has no counterpart in epmq",
        ),
        (content("ties", tokenizer={"sorce": "base"}), r"tokenizer has no option 'sorce', .*; did you mean source\?"),
        (content("ties", tokenizer={}, tokenizer_source="base"), "tokenizer_source or tokenizer, not both"),
    ],
)
def test_what_epmq_cannot_do_is_refused_by_name(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(text)


def test_wrong_slices_are_refused() -> None:
    source = {"model": "a", "layer_range": [0, 2]}
    for sources, message in (
        ([{**source, "layer_range": [2, 0]}], r"slices\[0\].sources\[0\].layer_range must be \[first, last \+ 1\]"),
        ([source, {"model": "b", "layer_range": [0, 3]}], r"must have as many layers each, got \[2, 3\]"),
        ([{"model": "a"}], r"slices\[0\].sources\[0\] needs layer_range"),
    ):
        with pytest.raises(ConfigError, match=message):
            checked({"merge_method": "linear", "slices": [{"sources": sources}]})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("a: [")
    for path in (tmp_path / "x.yml", tmp_path / "gone.yml"):
        with pytest.raises(ConfigError, match=f"merge.file={path} cannot be read"):
            read_mergekit(path)


def test_every_method_of_mergekit_that_epmq_has_takes_its_defaults() -> None:
    """With a weight or a place, which mergekit requires."""
    for method, parameters in PARAMETERS.items():
        if not (conf_dir() / "merge" / f"{OURS.get(method, method)}.yaml").exists():
            continue
        required = {name: 0.5 for name, default in parameters.items() if default == "required"}
        models = TWO[:1] if method in ("slerp", "nearswap", "arcee_fusion", "passthrough") else TWO
        text = content(method, parameters=required, models=models)
        found = options(text if method != "passthrough" else {**text, "base_model": None})
        assert found["merge"] == OURS.get(method, method)


@pytest.mark.parametrize("command", ["merge", "run"])
def test_the_printed_command_says_the_same(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it's.yml"
    path.write_text(yaml.safe_dump(content("dare_linear", parameters={"weight": 0.5, "density": 0.2}, dtype="float16")))
    start(command, ["--from-mergekit", str(path), "merge.density=0.3", "seed=1"])
    printed = shlex.split(capsys.readouterr().out)
    assert printed == [
        *("epmq", command, "suite=causal_lm", "suite.base=org/base", "suite.experts={math: org/math, code: org/code}"),
        *("merge=dare_linear", "merge.weights={math: 0.5, code: 0.5}", "merge.scale=1.0", "pack.dtype=float16"),
        *("merge.density=0.3", "seed=1"),
    ]
    typed_by_hand = ["merge=mergekit", f"merge.file={path}", "merge.density=0.3", "seed=1"]
    assert replaced(command, typed_by_hand) == printed[2:]
    assert replaced(command, ["merge=ties"]) == ["merge=ties"]


def test_the_file_is_named_once(tmp_path: Path) -> None:
    for given in (["merge=mergekit"], ["merge=mergekit", "merge.file=a", "merge.file=b"]):
        with pytest.raises(ConfigError, match=r"merge=mergekit needs one merge.file=config.yml, got (none|2)"):
            replaced("merge", given)
    with pytest.raises(ConfigError, match="epmq eval reads no mergekit file"):
        replaced("eval", ["merge=mergekit", "merge.file=a"])
    with pytest.raises(ConfigError, match=r"read on the command line alone, .* --from-mergekit a.yml prints"):
        Mergekit("a.yml").check(["x"])


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "two words",
        'a "quote"',
        "a\\",
        "{% for x in y %}\n${a} {{ 'b' }}{% endfor %}",
        "null",
        "1e-5",
        "",
        "<|a|>",
    ],
)
def test_texts_are_read_back_by_hydra(value: str) -> None:
    wanted = {"text": value, "inside": {"list": [value, 1e-08, None, True]}}
    overrides = OverridesParser.create().parse_overrides([f"{key}={typed(own)}" for key, own in wanted.items()])
    found = OmegaConf.create({override.key_or_group: override.value() for override in overrides})
    assert OmegaConf.to_container(found, resolve=True) == wanted


def test_slices_and_tokenizers_become_options() -> None:
    slices = mergekit_options(FILES / "slices.yml", "merge")
    assert slices["merge"] == "passthrough"
    assert [(entry["expert"], entry["layers"]) for entry in slices["merge.slices"]] == [
        ("FIRST", [0, 3]),
        ("FIRST", [2, 3]),
        ("SECOND", [1, 4]),
    ]
    with pytest.raises(ConfigError, match="makes a tokenizer or a chat template, which epmq run does not"):
        mergekit_options(FILES / "union.yml", "run")


def test_slices_of_other_methods_have_their_own_options() -> None:
    """The parameters of a model in a slice, then the slice's, then the file's; the base does not count as an expert."""
    sources = [{"model": model, "layer_range": [0, 2]} for model in ("org/base", "org/math")]
    second = [{"model": "org/base", "layer_range": [1, 3]}, {"model": "org/code", "layer_range": [2, 4]}]
    slices = [{"sources": sources}, {"sources": second, "parameters": {"density": 0.25}}]
    text = content("dare_linear", slices=slices, parameters={"weight": 1, "density": 0.5})
    del text["models"]
    file = checked(text)
    assert file.sliced
    found = merge_options(file, "merge")
    overrides = [f"{key}={typed(value)}" for key, value in {**suite_options(file), **found, "seed": 3}.items()]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("merge", overrides=["suite=causal_lm", *overrides])
    parts: list[Slice] = build("merge", cfg.merge).parts[""]
    assert [(part.layers, part.base) for part in parts] == [({"math": (0, 2)}, (0, 2)), ({"code": (2, 4)}, (1, 3))]
    assert [part.method for part in parts] == [DareLinear(density, 1.0, None, 3) for density in (0.5, 0.25)]
    text["slices"][1]["sources"] = second[1:]
    with pytest.raises(ConfigError, match="each of the slices must have base_model among its sources, got org/code"):
        merge_options(checked(text), "merge")


def test_a_run_reads_one_slice_of_all_layers_as_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    for end, merge in ((4, "task_arithmetic"), (3, "slices")):
        sources = [{"model": model, "layer_range": [0, end]} for model in (str(tmp_path), "org/math")]
        keys = {"merge_method": "task_arithmetic", "base_model": str(tmp_path), "parameters": {"weight": 1}}
        file = checked({**keys, "slices": [{"sources": sources}]})
        assert merge_options(file, "run")["merge"] == merge
        assert merge_options(file, "merge")["merge"] == "slices"
