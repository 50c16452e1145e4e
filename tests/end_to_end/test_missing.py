"""Oracle: the documented message or fallback if the machine lacks something: an extra, /proc, glibc, a writable
folder for machine code, locks. Each test removes one of them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import platform
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import epmq_cli.runtime.jit
from epmq_cli.config.schema import Harness
from epmq_cli.data.hub import Hub
from epmq_cli.data.microbatch import MicroBatcher
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError, DataError
from epmq_cli.evaluate.lm_eval import harness_scores
from epmq_cli.pipeline import keys
from epmq_cli.report import stage_timer
from epmq_cli.runtime import memory
from epmq_cli.store import run_lock


def test_data_sets_of_the_hub_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"me/it needs the datasets library; install it with pip install 'epmq-cli"):
        Hub("me/it").load("train", 1)


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"a.parquet needs pyarrow; install it with pip install 'epmq-cli\[tables\]'"):
        Table(str(tmp_path / "a.parquet"), str(tmp_path / "a.parquet")).load("train")


def test_the_harness_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evaluation = Harness(1, 1, (), "dequantize", True, ["x"], None, None)
    micro = MicroBatcher(1, "scoring", "lower eval.batch_size")
    with pytest.raises(ConfigError, match=r"needs lm-evaluation-harness; install it with pip install 'epmq-cli\[lm_e"):
        harness_scores(torch.nn.Linear(1, 1), tmp_path, torch.device("cpu"), evaluation, micro)


def test_without_proc_the_peak_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_timer, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none" / "status")
    measured = stage_timer.Stages(torch.device("cpu"))
    with measured.stage("x"):
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 0 < measured.records["x"]["peak_host_bytes"] <= most


def test_the_fallback_for_a_status_file_without_a_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmRSS: 3 kB\n")
    assert stage_timer._peak_bytes() > 1 << 20
    (tmp_path / "status").write_text("VmRSS: 3 kB\nVmHWM:\t5 kB\n")
    assert stage_timer._peak_bytes() == 5 * 1024


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_other_c_libraries_than_glibc_are_not_configured(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def library(name: object) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace()  # like musl, which has neither function

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(sys, "platform", system)
    memory.keep_freed()
    memory.give_back()
    assert asked == ([None, None] if system == "linux" else [])


def test_glibc_is_configured_to_keep_and_to_release_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, ...]] = []
    own = SimpleNamespace(mallopt=lambda *words: said.append(words), malloc_trim=lambda *words: said.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: own)
    monkeypatch.setattr(sys, "platform", "linux")
    memory.keep_freed()
    memory.give_back()
    assert said == [(-3, 1 << 25), (-1, 1 << 26), (0,)]


def test_machine_code_is_compiled_per_process_if_it_cannot_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    real, options = epmq_cli.runtime.jit.njit, []

    def njit(**given: Any) -> Any:
        options.append(given)
        if given.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file '<frozen>'")
        return real(**given)

    monkeypatch.setattr(epmq_cli.runtime.jit, "njit", njit)

    def twice(values: Any) -> None:
        for i in range(len(values)):
            values[i] *= 2

    values = torch.ones(3).numpy()
    epmq_cli.runtime.jit.compiled(twice)(values)
    assert values.tolist() == [2, 2, 2]
    assert options[1] == {"nogil": True, "error_model": "numpy"}


def test_a_file_system_without_locks_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING, "epmq"), run_lock.exclusive_lock(tmp_path):
        (tmp_path / run_lock.FOLDER / "key").mkdir()
        assert not run_lock.in_use(tmp_path)
    assert f"{tmp_path} cannot be locked: [Errno {errno.ENOLCK}] No locks available" in caplog.text
    assert (tmp_path / run_lock.FOLDER / "key").is_dir()


def test_without_cpuinfo_the_system_names_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "CPU", tmp_path / "none")
    assert keys._processor.__wrapped__() == (platform.processor() or platform.machine())
    (tmp_path / "none").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: Another\n")
    assert keys._processor.__wrapped__() == "Some CPU @ 3 GHz"
