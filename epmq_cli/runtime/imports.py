"""Imports of large libraries: faster, and when they are first used."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Wraps imports. Keeps Python's garbage collector from scanning the objects that they create, then and at exit.

    This saves one third of the import time of torch. It does nothing if torch is already imported.
    """
    if is_loaded("torch"):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_lazily(name: str) -> None:
    """Makes `import NAME` load the library when one of its attributes is first used.

    `from NAME import ...` and `import NAME.part` use one. Does nothing if the library is imported already, or missing.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = _Lazy(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    sys.modules[name] = module


def is_loaded(name: str) -> bool:
    """Whether a library is imported and, if its import is lazy, used."""
    return name in sys.modules and not isinstance(sys.modules[name], _Lazy)


class _Lazy(ModuleType):
    """A library that is not loaded yet. Unlike that of importlib.util.LazyLoader, it has its spec, which every further
    `import NAME` looks up, without being loaded. It has no `__path__`, which the import of a part looks up."""

    def __getattr__(self, attribute: str) -> Any:
        """Loads the library."""
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        try:
            with importing():
                self.__class__ = ModuleType  # type: ignore[assignment]
                self.__package__, self.__path__ = self.__name__, list(spec.submodule_search_locations or ())
                spec.loader.exec_module(self)
        except BaseException:
            del sys.modules[self.__name__]
            raise
        return getattr(self, attribute)
