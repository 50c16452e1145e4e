"""Oracle: the sentences below, for every option whose path names an unknown home folder or cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from epmq_cli.data.documents import Documents
from epmq_cli.data.hub import Hub
from epmq_cli.data.images import ImageFiles, ImageFolder, Npz
from epmq_cli.data.table import Table
from epmq_cli.errors import ConfigError, EpmqError
from epmq_cli.models.model_folder import SafetensorsFiles, read_json
from epmq_cli.models.resolve import locate
from epmq_cli.models.state_dict import open_file
from epmq_cli.runtime import paths
from epmq_cli.store.cache import cache_folder

NOBODY = "~no-such-user/x"
ASKED: dict[str, Callable[[], object]] = {
    "table": lambda: Table(f"{NOBODY}.tsv", f"{NOBODY}.tsv").load("test"),
    "documents": lambda: Documents(f"{NOBODY}.txt", f"{NOBODY}.txt").load("test"),
    "images": lambda: ImageFolder(NOBODY, NOBODY).load("test"),
    "npz": lambda: Npz(NOBODY).load("test"),
    "hub": lambda: Hub(path=NOBODY, input="a").folder,
    "expert of task a": lambda: locate(NOBODY, "expert of task a"),
    "suite.root": lambda: locate("owner/name", "base", NOBODY),
    "EPMQ_CACHE": cache_folder,
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_home_folder_of_an_unknown_user_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", NOBODY)
    said = (
        "names the home folder of ~no-such-user, a user that does not exist; give the full path, or ./~no-such-user/x"
    )
    with pytest.raises(ConfigError, match=said) as refused:
        ASKED[asked]()
    assert asked in ("table", "documents", "images", "npz", "hub") or str(refused.value).startswith(f"{asked}: ~")


READ: dict[str, Callable[[Path], object]] = {
    "x.tsv": lambda path: Table(str(path), str(path)).load("test"),
    "x.jsonl": lambda path: Documents(str(path), str(path)).load("test"),
    "x.txt": lambda path: Documents(str(path), str(path)).load("test"),
    "x.npz": lambda path: Npz(str(path)).load("test"),
    "x.png": lambda path: ImageFiles([path])[0],
    "x.safetensors": lambda path: SafetensorsFiles(path, "base"),
    "x.pt": lambda path: open_file(path, "base"),
    "config.json": lambda path: read_json(path.parent, path.name, "base"),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_without_permission_is_not_reported_as_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("{}")
    monkeypatch.setattr(paths.os, "access", lambda asked, mode: (asked, mode) != (path, os.R_OK))
    said = f"the user that epmq runs as has no permission to read {path}; change its permissions, or give another path"
    with pytest.raises(EpmqError) as refused:
        READ[name](path)
    assert str(refused.value).removeprefix("base: ") == said
