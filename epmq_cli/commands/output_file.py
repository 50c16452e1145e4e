"""The file that a command writes on request: a page or a table."""

from __future__ import annotations

from pathlib import Path

from epmq_cli.errors import ConfigError
from epmq_cli.runtime.console import messages, plain


def check_output(option: str, path: Path | None) -> None:
    """ConfigError if the option names a file in no folder, or a folder. None: no file is asked for."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: {path.parent} is not a folder; make it, or choose another file")


def write_output(path: Path, text: str) -> None:
    """Writes the file, and says so."""
    from epmq_cli.store.atomic import write_text

    write_text(path, text)
    messages.print(plain(f"wrote {path}"), markup=False, highlight=False, soft_wrap=True)
