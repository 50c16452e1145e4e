"""Oracle: the expert in transformers, whatever extra tensors base and expert store and whatever they lack."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from epmq_cli.commands.verify import verify
from epmq_cli.errors import CheckpointError, ModelError
from epmq_cli.store.manifest import write_manifest
from tests.conftest import drifted
from tests.end_to_end.test_lone import DECODER, ENCODER
from tests.helpers.lone import WRITERS, assert_same, merged_folder, store, suite_of

PAIR = ("merge", "run")
UP = "model.layers.1.mlp.up_proj.weight"
IDS = {"input_ids": torch.tensor([[1, 5, 6, 7]])}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(0)
    base = t.LlamaForCausalLM(t.LlamaConfig(**DECODER)).eval()
    return drifted(base, seed) if seed else base


def add_extra_tensors(tensors: dict[str, Tensor]) -> None:
    tensors |= {"v_head.summary.weight": torch.ones(1, 32), "v_head.empty": torch.zeros(0), "step": torch.tensor(7)}


@pytest.mark.parametrize("command", PAIR)
@pytest.mark.parametrize("both", [False, True])
def test_extra_tensors_of_the_base_are_left_out(
    both: bool, command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's value head, in the base alone or in the expert too; the lone expert is reproduced."""
    caplog.set_level(logging.WARNING, "epmq")
    base = store(llama(), tmp_path / "base", change=add_extra_tensors)
    expert = store(llama(1), tmp_path / "x", change=add_extra_tensors if both else None)
    made = WRITERS[command](tmp_path / "made", suite_of("causal_lm", base, {"x": expert}))
    assert_same(*(t.LlamaForCausalLM.from_pretrained(folder) for folder in (made, expert)))
    dropped = (
        "base: step, v_head.empty, v_head.summary.weight are left out, because LlamaForCausalLM has no module for them"
    )
    assert (dropped in caplog.text) == (command == "run" or not both)


def test_a_tensor_that_no_model_has_is_reported_missing(tmp_path: Path) -> None:
    """transformers would initialize it at random; verify reports it for a folder written by an older version."""
    folders = [store(llama(seed), tmp_path / str(seed), without=[UP]) for seed in (0, 1)]
    with pytest.raises(ModelError, match=rf"describes a LlamaForCausalLM with {UP}, which its files do not have"):
        merged_folder(tmp_path / "made", suite_of("causal_lm", folders[0], {"x": folders[1]}))
    write_manifest(folders[0], {})
    with pytest.raises(CheckpointError, match=f"{UP} is missing"):
        verify(folders[0], False, "cpu", None)


@pytest.mark.parametrize("owner", ["none", "base", "expert"])
def test_berts_without_a_pooler_are_merged(owner: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BertForMaskedLM has no pooler. The lone expert is reproduced; tensors that only the expert has are named."""
    caplog.set_level(logging.WARNING, "epmq")
    torch.manual_seed(0)
    kinds = {"none": t.BertForMaskedLM, "base": t.BertForMaskedLM, "expert": t.BertForPreTraining}
    base = (t.BertForPreTraining if owner == "base" else t.BertForMaskedLM)(t.BertConfig(**ENCODER)).eval()
    expert = drifted(kinds[owner](t.BertConfig(**ENCODER)).eval(), 2)
    folders = [store(base, tmp_path / "base"), store(expert, tmp_path / "x")]
    made = merged_folder(tmp_path / "made", suite_of("bert", folders[0], {"x": folders[1]}))
    assert_same(*(t.BertForMaskedLM.from_pretrained(folder) for folder in (made, folders[1])), IDS)
    assert ("bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text) == (owner == "expert")
