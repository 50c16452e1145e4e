"""Oracle: the recorded sha256 of checkpoint files, from a machine of the same kind.

After an intended change of the numerics: `python tests/end_to_end/same_bytes.py --record`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from tests.end_to_end.same_bytes_rows import ROWS
from tests.helpers.tiers import only

FAST = ("bert/merge/ties", "clip/expert/gptq", "causal_lm/feature/gptq")
ALL = only(FAST, (row.name for row in ROWS))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """same_bytes.py, loaded as a script, since it imports its siblings."""
    place = str(Path(__file__).parent)
    sys.path.insert(0, place)
    try:
        import same_bytes

        return same_bytes
    finally:
        sys.path.remove(place)


@pytest.fixture(scope="module")
def tables(script: ModuleType) -> ModuleType:
    """The sibling module that compares and records."""
    return sys.modules["same_bytes_table"]


@pytest.fixture(scope="module")
def inputs(script: ModuleType) -> Path:
    """The models, once all modules for the forked processes are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.import_all()
    folder: Path = script.cached_inputs()
    return folder


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_has_the_recorded_bytes(
    name: str, script: ModuleType, tables: ModuleType, inputs: Path, tmp_path: Path
) -> None:
    (row,) = [row for row in script.ROWS if row.name == name]
    expected = tables.recorded(row, inputs)
    if expected is None:
        pytest.skip(
            f"no hashes are recorded for {tables.machine()}; to record them, check out a commit that is known to be "
            "right and run: python tests/end_to_end/same_bytes.py --record"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of forks with threads
        files = script.run_row(row, inputs, tmp_path)
    assert "error" not in files, files["error"]
    assert {file: value for file, value in tables.short(files).items() if file in expected} == expected


def test_only_weights_of_portable_rows_are_expected_on_another_machine(
    script: ModuleType, tables: ModuleType, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for row in script.ROWS}
    if tables.recorded(rows["bert/merge/ties"], inputs) is None:
        pytest.skip("no hashes are recorded for these inputs, which other versions of libraries made")
    monkeypatch.setattr(tables, "machine", lambda: "another one")
    assert tables.recorded(rows["bert/feature/gptq"], inputs) is None
    assert tables.recorded(rows["bert/merge/ties"], inputs).keys() == {"model.safetensors"}


def test_differences_in_weights_count_and_those_in_records_do_not(
    tables: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"machine": "m", "inputs": {"bert": "i"}, "rows": {"one": {"model.safetensors": "a", "epmq.json": "b"}}}
    record = {**before, "rows": {"one": {"model.safetensors": "a", "epmq.json": "c"}}}
    weights = {**before, "rows": {"one": {"model.safetensors": "x", "epmq.json": "b"}}}
    assert tables.compare(before, before) == []
    assert tables.compare(before, record) == []
    assert "records that differ, by intention or not: epmq.json" in capsys.readouterr().out
    assert tables.compare(before, weights) == ["one"]
