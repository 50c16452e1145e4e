"""Oracles: values by hand, for each form of a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.parameters import PerExpert, PerTensor
from epmq_cli.merge.settings import TensorSetting, layer_depths
from tests.helpers.merging import merged, method, tensors

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.1.self_attn.q.weight",
    "model.layers.4.mlp.up.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_the_depth_of_a_tensor_is_that_of_its_layer_in_its_stack() -> None:
    assert list(layer_depths(NAMES).values()) == [0.0, 0.0, 0.25, 1.0, 1.0, 1.0]
    names = ["encoder.block.0.layer.1.x", "encoder.block.2.layer.0.x", "decoder.block.1.layer.0.x", "shared.weight"]
    assert list(layer_depths(names).values()) == [0.0, 1.0, 1.0, 0.0]
    assert layer_depths(["vision_model.encoder.layers.0.x", "visual_projection.weight"]) == {
        "vision_model.encoder.layers.0.x": 0.0,
        "visual_projection.weight": 1.0,
    }


RULES = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}, {"value": 2}]


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        (0.3, [0.3] * 6),
        ([0, 1], [0, 0, 0.25, 1, 1, 1]),
        ([0, 10, 0], [0, 0, 5, 0, 0, 0]),
        ([4], [4] * 6),
        (RULES, [2, 0.5, 0.25, 0.5, 2, 2]),
        ([{"filter": "mlp", "value": 0}, {"filter": "*", "value": 7}], [7, 0, 7, 0, 7, 7]),
        ([{"layers": False, "value": 5}, {"value": [0, 1]}], [5, 0, 0.25, 1, 5, 5]),
        (
            [{"filter": "norm", "layers": False, "value": 5}, {"layers": True, "value": 2}, {"value": 0}],
            [0, 2, 2, 2, 5, 0],
        ),
        ({"a": [0, 1]}, [0, 0, 0.25, 1, 1, 1]),
        ({"b": 1}, [7] * 6),
        (None, [7] * 6),
    ],
    ids=str,
)
def test_values(setting: Any, values: list[float]) -> None:
    if setting is not None:
        PerExpert(0, 10).check("merge.x", setting)
    made = TensorSetting(setting, 7, layer_depths(NAMES))
    assert [made.at(name, "a") for name in NAMES] == values


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("x", r"merge.x must be a number in \[0, 10\], a list of them over the layers, or a list of rules .*; got 'x'"),
        ([], r"merge.x must be a number in \[0, 10\], a list of them"),
        (None, r"merge.x must be a number in \[0, 10\], a list of them"),
        ({"a": 1}, r"merge.x must be a number in \[0, 10\], a list of them"),
        ([1, 11], r"merge.x\[1\] must be a number in \[0, 10\], got 11"),
        ([1, {"value": 1}], r"merge.x\[1\] must be a number"),
        ([{"value": 1}, 1], r"merge.x\[1\] must be a rule \{filter, value\} as the first item is, got 1"),
        ([{"filtr": "a", "value": 1}], r"merge.x\[0\] has no option 'filtr', .* are filter, layers, value; did you"),
        ([{"layers": 2, "value": 1}, {"value": 1}], r"merge.x\[0\].layers must be one of true, false, got 2"),
        ([{"layers": True, "value": 1}], "merge.x must end with a rule without filter"),
        ([{"filter": "a"}], r"merge.x\[0\] needs value, but only filter is set"),
        ([{"filter": 3, "value": 1}], r"merge.x\[0\].filter must be a part of tensor names, got 3"),
        ([{"filter": "a", "value": 1}], "merge.x must end with a rule without filter, for tensors that no other rule"),
        ([{"value": [1, -1]}], r"merge.x\[0\].value\[1\] must be a number in \[0, 10\], got -1"),
    ],
    ids=str,
)
def test_other_values_are_refused_by_their_place(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerTensor(0, 10).check("merge.x", setting)


def test_a_mapping_from_tasks_holds_any_of_the_forms() -> None:
    with pytest.raises(ConfigError, match=r"merge.x.a\[1\] must be a number in \[0, 10\], got 20"):
        PerExpert(0, 10).check("merge.x", {"a": [1, 20]})


def test_a_method_takes_them_by_tensor_and_by_task(tmp_path: Path) -> None:
    base, experts = tensors(0), {"one": tensors(1), "two": tensors(2)}
    weights = {"one": [{"filter": "bias", "value": 0}, {"value": 2}]}
    found = merged(tmp_path, method("task_arithmetic", scale=1, weights=weights), base, experts)
    vectors = {task: {name: expert[name] - base[name] for name in base} for task, expert in experts.items()}
    torch.testing.assert_close(found["a.bias"], base["a.bias"] + vectors["two"]["a.bias"])
    torch.testing.assert_close(
        found["a.weight"], base["a.weight"] + 2 * vectors["one"]["a.weight"] + vectors["two"]["a.weight"]
    )


def test_a_mapping_names_every_task_unless_it_may_leave_some_out() -> None:
    with pytest.raises(ConfigError, match="merge.x needs b, but only a is set"):
        PerExpert(0, 1).check_tasks("merge.x", {"a": 1}, ["a", "b"])
    PerExpert(0, 1, partial=True).check_tasks("merge.x", {"a": 1}, ["a", "b"])
    with pytest.raises(ConfigError, match="merge.x has no option 'c', the options are a, b"):
        PerExpert(0, 1, partial=True).check_tasks("merge.x", {"c": 1}, ["a", "b"])
