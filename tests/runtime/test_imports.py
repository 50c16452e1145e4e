"""Oracle: the state of Python's garbage collector."""

from __future__ import annotations

import gc
import sys

import pytest

from epmq_cli.runtime.imports import importing


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
