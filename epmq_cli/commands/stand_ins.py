"""Imports epmq's option classes without torch: `epmq list` shows their fields, types and checks, which need none of it.

In the block, the libraries that take long to import are modules without content: each name in them is an empty class,
which classes may extend, annotations may use, and decorators return functions from. Nothing can be computed with them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from epmq_cli.runtime.imports import importing

SLOW = (
    "torch",
    "numpy",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "open_clip",
    "compressed_tensors",
    "numba",
    "PIL",
)
"""The libraries that stand-ins replace."""


class StandIn(type):
    """The kind of the classes in place of a library's names."""

    def __getattr__(cls, name: str) -> Any:
        return _class(name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        """An object of a class that extends a stand-in. The function that a stand-in decorates, or itself."""
        if cls.__module__ != __name__:
            return super().__call__(*arguments, **options)
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else cls

    def __getitem__(cls, item: object) -> StandIn:
        return cls


class _Library(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _class(name)


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins for the libraries and the modules in them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The stand-in for a module of a slow library; None for other modules."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in SLOW else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module without content."""
        return _Library(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing."""


def _class(name: str) -> StandIn:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn(name, (), {"__module__": __name__})


@contextmanager
def stand_ins() -> Iterator[None]:
    """Imports in the block get stand-ins for slow libraries, which are forgotten after it. Modules of epmq keep theirs,
    so that the process can only print afterwards. Does nothing if one of the libraries is imported already."""
    if any(name in sys.modules for name in SLOW):
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with importing():
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Library)]:
            del sys.modules[name]
