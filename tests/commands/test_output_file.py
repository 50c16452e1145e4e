"""Oracle: the folders of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.commands.output_file import check_output, write_output
from epmq_cli.errors import ConfigError


def test_a_file_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    check_output("--html", path)
    check_output("--html", None)
    write_output(path, "text")
    check_output("--html", path)
    assert path.read_text() == "text"
    assert f"wrote {path}\n" in capsys.readouterr().err


def test_a_folder_and_a_file_in_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--html .* is a folder; give the name of a file in it"):
        check_output("--html", tmp_path)
    with pytest.raises(ConfigError, match=r"--out .*gone/a.csv: .*gone is not a folder; make it, or choose"):
        check_output("--out", tmp_path / "gone" / "a.csv")
