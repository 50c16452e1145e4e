"""Oracle: the values that a stranger could write into the epmq.json of a checkpoint; none is run, imported or looked
up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epmq_cli.checkpoint.task_heads import read_heads
from epmq_cli.errors import CheckpointError
from epmq_cli.families import FAMILIES
from epmq_cli.pipeline.reload import checkpoint_suite, read_record

CPU = torch.device("cpu")
DATA = {"_target_": "epmq_cli.data.table.Table", "train": "a.tsv", "test": "b.tsv"}
TASKS = {"first": {"expert": "models/first", "data": DATA}}
SUITE = {
    "_target_": "epmq_cli.data.suite.Suite",
    "name": "mini",
    "family": "bert",
    "base": "models/base",
    "tasks": TASKS,
}


def recorded(folder: Path, **fields: Any) -> Path:
    record = {"config": {"suite": {**SUITE, **fields}, "quant": {}}}
    (folder / "epmq.json").write_text(json.dumps(record))
    return folder


def test_a_record_builds_its_suite_with_another_mirror(tmp_path: Path) -> None:
    suite = checkpoint_suite(recorded(tmp_path, root="/theirs"), None, "/ours")
    assert (suite.name, suite.root, suite.members[0].data.train) == ("mini", "/ours", "a.tsv")


@pytest.mark.parametrize(
    "target",
    [
        "this.Table",  # prints when it is imported
        "os.system",
        "epmq_cli.data.table.Path",  # importable from epmq, but not part of it
        "epmq_cli.pipeline.steps.torch.Tensor",
        "epmq_cli.nothing.Table",
        "epmq_cli",
        "${oc.env:HOME}",
    ],
)
def test_code_outside_epmq_is_refused_before_it_is_imported(target: str, tmp_path: Path) -> None:
    data = {"first": {**TASKS["first"], "data": {**DATA, "_target_": target}}}
    with pytest.raises(
        CheckpointError, match="epmq.json names .*, which is not a class of epmq; if you trust it, give the"
    ):
        checkpoint_suite(recorded(tmp_path, tasks=data), None, None)
    assert "this" not in sys.modules


def test_a_record_cannot_read_the_environment(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"epmq.json contains an interpolation such as \$\{...\}, which epmq does not"
    ):
        checkpoint_suite(recorded(tmp_path, base="me/${oc.env:HF_TOKEN}"), None, None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"config": {}}', '{"config": 3}', "[" * 100_000, '{"config": []}'])
def test_an_invalid_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "epmq.json").write_text(text)
    with pytest.raises(CheckpointError, match="has no readable epmq.json; give the checkpoint folder"):
        read_record(tmp_path)


def test_a_record_without_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "epmq.json").write_text('{"config": {"suite": 3, "quant": {}}}')
    with pytest.raises(CheckpointError, match="was not written by epmq run; run epmq run again"):
        read_record(tmp_path)


HEADED = SimpleNamespace(members=[SimpleNamespace(name="first")])
FAMILY = FAMILIES["distilbert"]
HEAD = {"weight": (3, 2), "bias": (3,), "dense_weight": (2, 2), "dense_bias": (2,)}


def write_heads(folder: Path, **parts: torch.Tensor | None) -> None:
    """Writes a checkpoint folder with these parts of heads instead of the correct ones."""
    (folder / "config.json").write_text('{"model_type": "distilbert", "dim": 2}')
    tensors = {part: torch.ones(shape) for part, shape in HEAD.items()} | parts
    kept = {f"first.{part}": tensor for part, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "heads.safetensors")


def test_heads_are_read_by_task(tmp_path: Path) -> None:
    write_heads(tmp_path)
    assert {*read_heads(tmp_path, HEADED, FAMILY, CPU)["first"]} == {*HEAD}  # type: ignore[arg-type]
    write_heads(tmp_path, bias=None)
    assert {*read_heads(tmp_path, HEADED, FAMILY, CPU)["first"]} == {*HEAD} - {"bias"}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weight", "second.weight", ".weight", "first"])
def test_heads_with_other_names_are_refused(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"heads.safetensors has no head for task first; its tasks are"):
        read_heads(tmp_path, HEADED, FAMILY, CPU)  # type: ignore[arg-type]


def test_pickled_heads_are_refused(tmp_path: Path) -> None:
    torch.save({"first.weight": torch.ones(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"heads.safetensors cannot be read \(.*\); run epmq run again"):
        read_heads(tmp_path, HEADED, FAMILY, CPU)  # type: ignore[arg-type]


WRONG_HEADS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "width": ({"dense_weight": torch.ones(2, 5)}, r"first.dense_weight is \[2, 5\], config.json implies \[2, 2\]"),
    "width of the linear": ({"weight": torch.ones(3, 5)}, r"first.weight is \[3, 5\], config.json implies \[3, 2\]"),
    "bias": ({"bias": torch.ones(2)}, r"first.bias is \[2\], config.json implies \[3\]"),
    "no classes": (
        {"weight": torch.ones(0, 2), "bias": None},
        r"first.weight is \[0, 2\], config.json implies \[1, 2\]",
    ),
    "one dimension": ({"weight": torch.ones(2), "bias": None}, r"first.weight is \[2\], config.json implies \[2, 2\]"),
    "no dimension": ({"weight": torch.tensor(1.0), "bias": None}, r"first.weight is \[\], .* implies another shape"),
    "half": ({"weight": torch.ones(3, 2).half()}, "first.weight is of type F16, epmq writes F32"),
    "integers": ({"bias": torch.ones(3).int()}, "first.bias is of type I32, epmq writes F32"),
    "no weight": ({"weight": None}, "first.weight is missing"),
    "another part": ({"foo": torch.ones(1)}, "first.foo is not a part of a head"),
    "NaN": ({"weight": torch.full((3, 2), torch.nan)}, "first.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_heads_that_do_not_match_the_model_are_refused(case: str, tmp_path: Path) -> None:
    parts, message = WRONG_HEADS[case]
    write_heads(tmp_path, **parts)
    with pytest.raises(
        CheckpointError, match=f"does not hold the heads of this model: {message}; fetch it again"
    ) as raised:
        read_heads(tmp_path, HEADED, FAMILY, CPU)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
