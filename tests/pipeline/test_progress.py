"""Oracles: the first result, and how often it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.pipeline.progress import RunProgress, close, opened
from epmq_cli.pipeline.unfinished import refuse_results
from epmq_cli.store.run_lock import FOLDER

CPU = torch.device("cpu")


def test_a_value_is_computed_once(tmp_path: Path) -> None:
    made = []
    for state in (RunProgress(tmp_path), RunProgress(tmp_path)):
        assert state.value("x", lambda: made.append(1) or {"a": 0.1 + 0.2}) == {"a": 0.1 + 0.2}
    assert len(made) == 1


def test_without_a_folder_it_is_computed_every_time() -> None:
    made = []
    for _ in range(2):
        RunProgress().value("x", lambda: made.append(1))
    assert len(made) == 2
    assert RunProgress().part("y").starts == 0


def test_tensors_come_back_to_the_last_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor([1, 2]).int()}
    RunProgress(tmp_path).tensors("x", CPU, lambda: tensors)
    found = RunProgress(tmp_path).tensors("x", CPU, dict)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_only_the_value_of_a_finished_part_is_kept(tmp_path: Path) -> None:
    state = RunProgress(tmp_path)
    assert state.finished("x", lambda: state.part("x").value("inner", lambda: 1)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"x.json"}


def test_progress_is_identified_by_its_key(tmp_path: Path) -> None:
    first = opened(tmp_path, {"bits": 4}, "auto")
    first.value("x", lambda: 1)
    assert opened(tmp_path, {"bits": 3}, "auto").value("x", lambda: 2) == 2
    again = opened(tmp_path, {"bits": 4}, "auto")
    assert again.value("x", lambda: 3) == 1
    assert (first.starts, again.starts) == (1, 1)  # both look at the same file
    assert opened(tmp_path, {"bits": 4}, "never").value("x", lambda: 3) == 3
    assert len(list((tmp_path / FOLDER).glob("*/"))) == 1
    close(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_refused_unless_this_run_was_writing_it(tmp_path: Path) -> None:
    state = opened(tmp_path, {"bits": 4}, "auto")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="already holds checkpoint"):
        refuse_results(tmp_path, state)
    state.begin_packing()
    refuse_results(tmp_path)
    refuse_results(tmp_path, state)
    with pytest.raises(ConfigError, match="already holds checkpoint"):
        refuse_results(tmp_path, opened(tmp_path, {"bits": 3}, "auto"))
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ConfigError, match=r"already holds checkpoint and metrics.json"):
        refuse_results(tmp_path, state)
