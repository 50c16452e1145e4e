"""Oracles: pipes in place of files, names that are not text, impossible widths; `pack_to_int32` for the sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from epmq_cli.checkpoint.exporter import words
from epmq_cli.errors import CheckpointError
from epmq_cli.pipeline.reload import read_record
from epmq_cli.pipeline.verify import score_problems
from epmq_cli.store.manifest import MANIFEST, write_manifest
from tests.commands.test_verify import MODEL, check
from tests.conftest import Run


def test_file_names_that_are_not_utf_8_are_shown(checkpoint: Path, epmq_inside: Run) -> None:
    Path(os.fsdecode(os.fsencode(checkpoint) + b"/odd\xff")).touch()
    found = epmq_inside("verify", str(checkpoint))
    assert (found.returncode, found.stdout) == (1, "odd? is not listed in manifest.json\n")


@pytest.mark.parametrize("name", [MANIFEST, "epmq.json", MODEL, "README.md"])
def test_a_pipe_in_place_of_a_file_is_refused_without_blocking(name: str, checkpoint: Path) -> None:
    size = (checkpoint / name).stat().st_size
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    if name != MANIFEST:
        manifest = (checkpoint / MANIFEST).read_text()
        (checkpoint / MANIFEST).write_text(manifest.replace(f'"size": {size},', '"size": 0,'))
    message = (
        "has no readable manifest.json; give" if name == MANIFEST else f"wrote: {name} is not a regular file; fetch"
    )
    with pytest.raises(CheckpointError, match=message):
        check(checkpoint)


def test_pipes_for_the_record_and_the_scores_are_refused(checkpoint: Path) -> None:
    for path in (checkpoint / "epmq.json", checkpoint.parent / "metrics.json"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"has no readable epmq.json; give"):
        read_record(checkpoint)
    with pytest.raises(CheckpointError, match=r"is not a readable metrics.json of epmq run; give"):
        score_problems(checkpoint, torch.device("cpu"), None)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_number_of_words_is_that_of_the_packing(bits: int) -> None:
    for count in range(1, 100):
        assert words(count, bits) == pack_to_int32(torch.zeros(1, count, dtype=torch.int8), bits).shape[1]


def test_a_config_of_enormous_widths_takes_no_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check packs no tensor of that width."""
    monkeypatch.setattr("compressed_tensors.compressors.pack_quantized.helpers.pack_to_int32", Mock())
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 100_000_000
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_manifest(checkpoint, {})
    with pytest.raises(CheckpointError, match=r"config.json implies \[100000000"):
        check(checkpoint)
