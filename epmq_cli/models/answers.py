"""Caches answers of transformers on disk: its import takes seconds, and the same files give the same answer.

The cache key covers everything that an answer depends on: the question, the library versions and the calling code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from epmq_cli.runtime.versions import installed_version
from epmq_cli.store.cache import Cache, cache_folder
from epmq_cli.store.hashing import content

LIBRARIES = ("transformers", "tokenizers", "torch")
LIMIT = 64 << 20
"""The maximum size of the cache in bytes."""


def cached_answer(question: Mapping[str, Any], ask: Callable[[], Any], code: str) -> Any:
    """Returns the JSON value of `ask()`, from the cache if the same question was answered before.

    `code`: the source file of the calling module. Without a writable cache, every call runs `ask`.
    """
    versions = {name: installed_version(name) for name in LIBRARIES}
    key = {"question": question, "versions": versions, "code": _source(code)}
    return Cache(cache_folder() / "transformers", LIMIT, failure=logging.DEBUG).value(key, ask)


@cache
def _source(code: str) -> str:
    return content(Path(code)).sha256
