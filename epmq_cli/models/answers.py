"""Keeps answers of transformers on disk: importing it takes seconds, and the same files give the same answer.

An answer is kept under all that it depends on: what was asked, the versions of the libraries, and the code that asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epmq_cli.store.cache import Cache, cache_folder
from epmq_cli.store.hashing import content

LIBRARIES = ("transformers", "tokenizers", "torch")
LIMIT = 64 << 20
"""Bytes of all answers together."""


def kept_answer(question: Mapping[str, Any], ask: Callable[[], Any], code: str) -> Any:
    """What `ask` returns, as JSON holds it, or returned earlier for the same question; `code`: the file of the module
    that asks. Where nothing can be kept, it is asked each time."""
    versions = {name: version(name) for name in LIBRARIES}
    key = {"question": question, "versions": versions, "code": content(Path(code)).sha256}
    return Cache(cache_folder() / "transformers", LIMIT, failure=logging.DEBUG).value(key, ask)
