"""GPTQModel's own loader on a CPU. Oracle: transformers on the same checkpoint. `make engines` runs this.

Kinds with zero points are in the storage `gptq_v2`, as this loader needs them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from epmq_cli.checkpoint.engines import ENGINES
from tests.engines.greedy import COUNT, PROMPT, by_transformers
from tests.helpers.engine_kinds import KINDS, write_kind

PYTHON = os.environ.get("EPMQ_GPTQMODEL", "")
"""The Python of an environment with GPTQModel."""
NAMES = [name for name, kind in KINDS.items() if kind.families == ("causal_lm",) and kind.pack == "gptq"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs GPTQModel: make engines"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The checkpoint of each kind, and GPTQModel's answer."""
    folders = {name: write_kind(tmp_path_factory.mktemp(name), name, "causal_lm") for name in NAMES}
    folders["gpt2"] = write_kind(tmp_path_factory.mktemp("gpt2"), "gptq", "causal_lm", "gpt2")
    side = Path(__file__).with_name("gptqmodel_side.py")
    command = [PYTHON, str(side), json.dumps(PROMPT), str(COUNT), *map(str, folders.values())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (folders[name], answer) for name, answer in zip(folders, found, strict=True)}


@pytest.mark.parametrize("name", [*NAMES, "gpt2"])
def test_gptqmodel_writes_what_transformers_writes(name: str, answers: Any) -> None:
    """Its kernels compute in float16."""
    assert name == "gpt2" or KINDS[name].refusals(ENGINES["gptqmodel"]) == [None]
    folder, answer = answers[name]
    wanted = by_transformers(folder)
    assert "error" not in answer, answer
    assert answer["result"][0][0] == wanted[0][0]
    assert answer["result"][0][1] == pytest.approx(wanted[0][1], abs=0.02)
