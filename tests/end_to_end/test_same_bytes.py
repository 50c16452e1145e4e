"""Oracle: the sha256 of checkpoint files that were recorded on a processor and with libraries of the same kind.

After a change that is meant to change numerics: `python tests/end_to_end/same_bytes.py --record`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).parent
QUICK = ("bert/merged/rtn", "bert/merge/ties", "clip/expert/gptq", "causal_lm/feature/gptq")
SLOW = [row for row in RECORDED["rows"] if row not in QUICK]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """same_bytes.py, which imports its neighbours as a script does."""
    sys.path.insert(0, str(PLACE))
    try:
        import same_bytes

        return same_bytes
    finally:
        sys.path.remove(str(PLACE))


@pytest.fixture(scope="module")
def inputs(script: ModuleType) -> Path:
    folder: Path = script.cached_inputs()
    return folder


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW)])
def test_a_checkpoint_has_the_recorded_bytes(name: str, script: ModuleType, inputs: Path, tmp_path: Path) -> None:
    (row,) = [row for row in script.ROWS if row.name == name]
    expected = script.recorded(RECORDED, row, inputs)
    if expected is None:
        pytest.skip(
            f"no hashes are recorded for {script.machine()}; to record them, check out a commit that is known to be "
            "right and run: python tests/end_to_end/same_bytes.py --record"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of forks beside threads
        files = script.run_row(row, inputs, tmp_path)
    assert "error" not in files, files["error"]
    assert {file: script.short(files)[file] for file in expected} == expected


def test_a_difference_in_weights_counts_and_one_in_records_does_not(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"machine": "m", "inputs": "i", "rows": {"one": {"model.safetensors": "a", "epmq.json": "b"}}}
    record = {**before, "rows": {"one": {"model.safetensors": "a", "epmq.json": "c"}}}
    weights = {**before, "rows": {"one": {"model.safetensors": "x", "epmq.json": "b"}}}
    assert script.compare(before, before) == []
    assert script.compare(before, record) == []
    assert "records that differ, by intention or not: epmq.json" in capsys.readouterr().out
    assert script.compare(before, weights) == ["one"]
