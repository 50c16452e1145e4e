"""Oracle: the state of Python's garbage collector, and a package that records when it is loaded."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from epmq_cli.runtime.imports import import_lazily, importing, is_loaded


def test_the_collector_is_off_during_imports_and_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_nothing_changes_if_torch_is_imported_already() -> None:
    import torch

    assert torch.__name__ in sys.modules
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_library_is_loaded_when_an_attribute_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_library").mkdir()
    (tmp_path / "slow_library" / "__init__.py").write_text("import slow_library\nanswer = 42\n")
    (tmp_path / "slow_library" / "part.py").write_text("import slow_library\ntwice = 2 * slow_library.answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    for first in ("answer", "part"):
        for name in ("slow_library", "slow_library.part"):
            sys.modules.pop(name, None)
        import_lazily("slow_library")
        for _ in range(2):  # Python looks up the spec of a module that is imported again
            library = importlib.import_module("slow_library")
        assert importlib.util.find_spec("slow_library") is not None
        assert not is_loaded("slow_library")
        if first == "part":
            assert importlib.import_module("slow_library.part").twice == 84
        assert library.answer == 42
        assert is_loaded("slow_library")
        import_lazily("slow_library")
        assert sys.modules["slow_library"] is library
    import_lazily("no_such_library")
    assert not is_loaded("no_such_library")


def test_a_library_that_cannot_be_loaded_says_so_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_lazily("broken_library")
    with pytest.raises(ImportError, match="broken"):
        sys.modules["broken_library"].answer  # noqa: B018
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("broken_library")
