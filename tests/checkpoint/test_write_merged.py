"""Oracles: the types in the files, and the type in which transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor

from epmq_cli.checkpoint.dense import DenseExporter
from epmq_cli.commands.verify import verify
from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.merge.suite_models import SuiteModels, written_dtype
from tests.conftest import drifted
from tests.end_to_end.test_lone import DECODER, settings_of
from tests.helpers.lone import WRITERS, merged_folder, store, suite_of
from tests.helpers.tiers import every

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
NAMES = {HALF: "float16", BRAIN: "bfloat16", FULL: "float32"}
LAST = "model.norm.weight"  # the last name in order; its type once decided the type of all tensors


def llama(folder: Path, seed: int, dtype: torch.dtype, norms: torch.dtype, says: str | None) -> Path:
    """A model whose norms have their own type and whose config.json names a type, or none."""
    torch.manual_seed(0)
    base = t.LlamaForCausalLM(t.LlamaConfig(**DECODER)).eval()

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(norms if "norm" in name else dtype)

    store(drifted(base, seed) if seed else base, folder, change=change)
    settings: dict[str, Any] = {key: value for key, value in settings_of(folder).items() if key != "dtype"}
    (folder / "config.json").write_text(json.dumps(settings | ({"torch_dtype": says} if says else {})))
    return folder


CASES = [
    # the base's weights and norms, the expert's, what the base's config.json says
    (BRAIN, FULL, BRAIN, FULL, "bfloat16"),  # norms in float32
    (BRAIN, FULL, FULL, FULL, "bfloat16"),  # an expert that was saved in float32
    (HALF, HALF, BRAIN, BRAIN, "float16"),
    (FULL, FULL, BRAIN, BRAIN, "bfloat16"),  # a config that names another type than that of the files
    (BRAIN, BRAIN, BRAIN, BRAIN, None),
]


@pytest.mark.parametrize(
    ("weights", "norms", "own", "own_norms", "says", "command"),
    every(2, ((*case, command) for command in WRITERS for case in CASES)),
)
def test_the_type_is_that_of_most_elements_and_config_json_names_it(
    weights: torch.dtype,
    norms: torch.dtype,
    own: torch.dtype,
    own_norms: torch.dtype,
    says: str | None,
    command: str,
    tmp_path: Path,
) -> None:
    """`epmq merge` keeps the base's type of each tensor; with dtype=auto, transformers loads all tensors in the type
    of most elements."""
    base = llama(tmp_path / "base", 0, weights, norms, says)
    expert = llama(tmp_path / "x", 1, own, own_norms, NAMES[own])
    made = WRITERS[command](tmp_path / "made", suite_of("causal_lm", base, {"x": expert}))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (made, expert))
    for name, tensor in found.items():
        kind = norms if command == "merge" and "norm" in name else weights
        assert tensor.dtype == kind
        assert torch.equal(tensor, wanted[name].float().to(kind))
    assert settings_of(made)["dtype"] == NAMES[weights]
    assert "torch_dtype" not in settings_of(made)
    loaded = t.LlamaForCausalLM.from_pretrained(made, dtype="auto")
    assert {tensor.dtype for tensor in loaded.parameters()} == {weights}
    if command == "merge":
        verify(made, False, "cpu", None)


def test_experts_of_a_wider_type_are_reported_and_pack_dtype_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert = llama(tmp_path / "base", 0, BRAIN, BRAIN, None), llama(tmp_path / "x", 1, FULL, FULL, None)
    suite = suite_of("causal_lm", base, {"x": expert})
    source = SuiteModels(suite, FAMILIES["causal_lm"]).source
    assert written_dtype(source, "auto") == BRAIN
    said = "".join(capsys.readouterr().err.split("\n"))
    assert "experts of x are stored in float32, the result in bfloat16 as the base is; pack.dtype=float32 keeps" in said
    made = merged_folder(tmp_path / "made", suite, DenseExporter("float32", "5GB", None, False))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (made, expert))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert settings_of(made)["dtype"] == "float32"


def test_values_outside_the_range_of_the_bases_type_are_refused(tmp_path: Path) -> None:
    """The largest float16 value is 65504; bfloat16 has a larger range."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[LAST] = tensors[LAST] * 1e6

    base, expert = llama(tmp_path / "base", 0, HALF, HALF, None), llama(tmp_path / "x", 1, BRAIN, BRAIN, None)
    model = t.LlamaForCausalLM.from_pretrained(expert)
    store(model, expert, change=change)
    with pytest.raises(ModelError, match="does not fit into float16; choose another pack.dtype, such as bfloat16"):
        merged_folder(tmp_path / "made", suite_of("causal_lm", base, {"x": expert}))
