"""Folders in sentence-transformers itself, without epmq. Oracle: its embeddings equal ours, for folders that a user
gives and for checkpoints of both commands. `make engines` runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from epmq_cli.commands.merge import merge
from epmq_cli.data.samples import Samples
from epmq_cli.families import recorded_family
from epmq_cli.families.family import load_model
from epmq_cli.families.tasks.embedding import Embedding
from tests.families.test_sentence import CPU, KINDS, TEXTS, task_of
from tests.helpers.hubs import merge_config, run_in
from tests.helpers.sentences import PROMPTS, sentence_hub

PYTHON = os.environ.get("EPMQ_SENTENCE_TRANSFORMERS", "")
"""The Python of an environment with sentence-transformers and compressed-tensors."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs sentence-transformers: make engines"),
]


def made(folder: Path, kind: str) -> dict[str, Path]:
    """An expert and the checkpoints of both commands."""
    hub = sentence_hub(folder / "hub", kind, **KINDS[kind])
    dense = folder / "merged"
    merge(merge_config(hub), dense, [])
    return {"expert": hub / "first", "merged": dense / "checkpoint", "run": run_in(folder / "run", hub, "bits=4")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Any]]:
    """The folders with the answers for each."""
    folders = {(kind, name): path for kind in KINDS for name, path in made(tmp_path_factory.mktemp(kind), kind).items()}
    jobs = [{"folder": str(path), "texts": TEXTS, "prompt": PROMPTS["usual"]} for path in folders.values()]
    side = Path(__file__).with_name("sentence_transformers_side.py")
    done = subprocess.run([PYTHON, str(side)], input=json.dumps(jobs), check=True, stdout=subprocess.PIPE, text=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    return {case: (path, answer) for (case, path), answer in zip(folders.items(), answers, strict=True)}


@pytest.mark.parametrize("name", ["expert", "merged", "run"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_ours(kind: str, name: str, found: Any) -> None:
    folder, answer = found[kind, name]
    family = recorded_family("auto", folder, "checkpoint")
    inside = folder / (KINDS[kind].get("inside", "") if name == "expert" else "")
    model, task, tasks = load_model(family, inside, CPU), task_of(), family.tasks
    assert isinstance(tasks, Embedding)
    batch = family.collate(inside, task)(list(tasks.worded(task, Samples(TEXTS)).inputs))
    with torch.inference_mode():
        own = tasks.embeddings(family.features(model, batch))
        same = tasks.similarities(own, own)
    torch.testing.assert_close(torch.tensor(answer["rows"]), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(answer["same"]), same, rtol=1e-4, atol=1e-5)
