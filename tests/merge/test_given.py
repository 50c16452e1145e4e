"""Oracles: the run of the method that made the merge, and the sentences of models that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from epmq_cli.errors import ModelError
from tests.commands.test_merge import merged
from tests.helpers.hubs import run_in

OPTIONS = ("eval.samples=8", "pack.dtype=float32")


def test_a_run_from_a_given_merge_is_the_run_of_the_method_that_made_it(clip_hub: Path, tmp_path: Path) -> None:
    made = merged(clip_hub, tmp_path / "made", "merge=ties", "pack.dtype=float32")
    found = run_in(tmp_path / "x", clip_hub, "merge=given", f"merge.path={made}", *OPTIONS)
    expected = run_in(tmp_path / "y", clip_hub, "merge=ties", *OPTIONS)
    one, other = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_given_merge_of_another_model_is_refused_by_its_role(clip_hub: Path, bert_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="given merge"):
        run_in(tmp_path / "x", clip_hub, "merge=given", f"merge.path={bert_hub / 'base'}", *OPTIONS)


def test_a_given_merge_that_changes_is_another_run(clip_hub: Path, tmp_path: Path) -> None:
    folder = merged(clip_hub, tmp_path / "made", "merge=ties", "pack.dtype=float32")
    options = ("merge=given", f"merge.path={folder}", "cache=10MB", *OPTIONS)
    first = load_file(run_in(tmp_path / "x", clip_hub, *options) / "model.safetensors")
    other = merged(clip_hub, tmp_path / "other", "merge=average", "pack.dtype=float32")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    second = load_file(run_in(tmp_path / "y", clip_hub, *options) / "model.safetensors")
    assert not all(first[name].equal(second[name]) for name in first)
