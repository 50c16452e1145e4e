"""Versions of transformers without epmq. Oracle: epmq_cli.load, which dequantizes by itself. `make engines` runs this.

`SINCE` is what docs/checkpoint.md says: the first version with which a kind of checkpoint has the outputs of our own
reading. With earlier ones it fails, or has others.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import epmq_cli
from tests.engines.transformers_side import PIXELS, TOKENS
from tests.helpers.engine_kinds import KINDS, write_kind
from tests.helpers.pages import ROOT

PYTHON = os.environ.get("EPMQ_TRANSFORMERS", "")
"""The Python of an environment with transformers and compressed-tensors."""
FIRST, POINTS, CLIP, ALL = "5.0.0", "5.5.4", "5.19.0", "5.23.0"
SINCE = {
    **dict.fromkeys(("int4-zeros", "int8-zeros"), POINTS),
    **dict.fromkeys(("w8a8", "w4a8", "fp8-dynamic", "fp8-static", "fp8-block"), ALL),
    **dict.fromkeys(("nvfp4", "nvfp4-a4", "mxfp4", "mxfp8", "mxfp6"), ALL),
}
CASES = [
    (name, family)
    for name, kind in KINDS.items()
    for family in kind.families
    if kind.pack != "gptq" and family in ("causal_lm", "bert", "clip")
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs another transformers: make engines"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, dict[tuple[str, str], tuple[Path, Any]]]:
    """The version, and the checkpoint of each case with the answer."""
    folders = {case: write_kind(tmp_path_factory.mktemp("-".join(case)), *case) for case in CASES}
    jobs = [{"folder": str(folder), "family": family} for (_, family), folder in folders.items()]
    side = Path(__file__).with_name("transformers_side.py")
    done = subprocess.run([PYTHON, str(side)], input=json.dumps(jobs), check=True, stdout=subprocess.PIPE, text=True)
    version, *answers = json.loads(done.stdout.splitlines()[-1])
    return Version(version), {case: (folders[case], answer) for case, answer in zip(CASES, answers, strict=True)}


def own(folder: Path, family: str) -> torch.Tensor:
    """The same outputs by epmq_cli.load."""
    model: Any = epmq_cli.load(folder, device="cpu", kernel="dequantize")
    if family == "clip":
        return model.get_image_features(pixel_values=PIXELS).pooler_output
    answer = model(input_ids=torch.tensor(TOKENS))
    return answer.logits if family == "causal_lm" else answer.last_hidden_state


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_checkpoint_has_its_outputs_since_a_version(name: str, family: str, found: Any) -> None:
    version, answers = found
    folder, answer = answers[name, family]
    since = CLIP if family == "clip" and KINDS[name].pack != "dense" else SINCE.get(name, FIRST)
    wanted = own(folder, family).flatten()
    same = "result" in answer and torch.allclose(torch.tensor(answer["result"]), wanted, atol=1e-5, rtol=0)
    assert same == (version >= Version(since)), answer.get("error")


def test_the_documentation_names_the_versions() -> None:
    text = (ROOT / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    assert [version for version in (FIRST, POINTS, CLIP, ALL) if f"| {version} |" not in text] == []
