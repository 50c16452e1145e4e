"""Oracle: a fresh process, which has not loaded torch when a run says that its config, data or folders are bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_bad_inputs import BAD
from tests.helpers import edited
from tests.helpers.changes import entry, file, rows
from tests.helpers.minihub import build

DRIVER = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO

import epmq_cli.commands.run as command
from epmq_cli.cli import main
from epmq_cli.runtime import console
from epmq_cli.runtime.imports import import_lazily, is_loaded

def passed():
    raise SystemExit("passed")

command.tell_loading = passed  # the last line before torch is imported
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["epmq", "run", *arguments]
    console.complaints.file = told = StringIO()
    try:
        main()
    except SystemExit as error:
        answers.append(["" if error.code == "passed" else told.getvalue().strip(), is_loaded("torch")])
print(json.dumps(answers))
"""


def answers(*commands: list[str]) -> list[tuple[str, bool]]:
    """Of each command, its sentence before torch is needed, empty if there is none, and whether torch is loaded."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], stdout=subprocess.PIPE, check=True, text=True
    )
    return [(sentence, loaded) for sentence, loaded in json.loads(done.stdout.splitlines()[-1])]


def of_hub(hub: Path, *overrides: str) -> list[str]:
    return ["--config-dir", str(hub / "configs"), "suite=mini", "device=cpu", f"out={hub}/run", *overrides]


CONFIGS = {
    "bits=99": "bits must be one of 2, 3, 4, 5, 6, 7, 8",
    "+merge.densty=1": "merge has no option 'densty'",
    "quant.damping=-1": "quant.damping must be a number in",
    "device=tpu": "device must be auto, cpu, cuda",
    "suite.base=missing/model/folder": "base: missing/model/folder is neither an existing folder",
}


def test_faults_are_told_before_torch_is_loaded(bert_hub: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "row 1: no value in column text": rows("train", "label\tx\n1\t1\n"),
        "labels must be whole numbers from 0, got 'red'": rows("test", "label\ttext\nred\tred\n"),
        "first_test.tsv is not a file": file("first_test.tsv", None),
        "expert of task first: no/such/expert is neither an existing": entry(expert="no/such/expert"),
        "": lambda hub: None,
    }
    hubs = [edited.copied(bert_hub, tmp_path / str(number)) for number in range(len(changes))]
    for hub, change in zip(hubs, changes.values(), strict=True):
        change(hub)
    commands = [of_hub(hubs[-1], option) for option in CONFIGS] + [of_hub(hub) for hub in hubs]
    told = answers(*commands)
    for (sentence, loaded), expected in zip(told, [*CONFIGS.values(), *changes], strict=True):
        assert expected in sentence
        assert bool(expected) == bool(sentence)
        assert not loaded


EARLY = {
    "a label of 30 digits",
    "a label with a fraction",
    "an empty file",
    "labels in words",
    "labels that are NaN",
    "labels with fractions",
    "no UTF-8",
    "no column of labels",
    "no column of text",
    "no column of texts",
    "no file",
    "no label",
    "no pictures to calibrate on",
    "no pictures to score on",
    "no rows to calibrate on",
    "no rows to score on",
    "pictures without a pixel",
    "text that is a number",
}
"""The cases of BAD that the first check tells. The others need a head, a tokenizer, or the shapes of all tensors."""


@pytest.mark.slow
def test_bad_inputs_are_told_before_torch_is_loaded_where_headers_and_first_rows_tell_them(
    clip_hub: Path, bert_hub: Path, tmp_path: Path
) -> None:
    kinds = {"clip": clip_hub, "bert": bert_hub}
    kinds |= {kind: build(tmp_path / kind, kind) for kind in ("t5", "llama", "vit")}
    commands, expected = [], []
    for number, (kind, change, _, message) in enumerate(BAD.values()):
        hub = edited.copied(kinds[kind], tmp_path / str(number))
        change(hub)
        commands.append(of_hub(hub, "eval.samples=30"))
        expected.append(message)
    told = dict(zip(BAD, zip(answers(*commands), expected, strict=True), strict=True))
    early = {case for case, ((sentence, _), _) in told.items() if sentence}
    assert not any(loaded for (_, loaded), _ in told.values())
    assert all(message in sentence for (sentence, _), message in told.values() if sentence)
    assert early == EARLY
