"""Oracles: the forward pass of transformers, and the names that save_pretrained writes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from epmq_cli.models.model_folder import SafetensorsFiles
from epmq_cli.models.routed_experts import RoutedExperts, routers, unpacked
from tests.helpers.architectures import MIXED, TAKEN, built
from tests.helpers.tiers import only

IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [3, 2, 1, 5, 9, 9]])


@pytest.mark.parametrize("kind", only(("mixtral",), [kind for kind in MIXED if kind != "llama4_text"]))
def test_unpacked_experts_compute_the_same_under_the_names_of_files(kind: str, tmp_path: Path) -> None:
    model = built(TAKEN[kind])
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    wanted = model(IDS).logits
    own = unpacked(model)
    assert own is model
    assert own.state_dict().keys() == SafetensorsFiles(tmp_path, "model").infos.keys()
    assert torch.equal(own(IDS).logits, wanted)
    assert torch.equal(copy.deepcopy(own)(IDS).logits, wanted)
    assert unpacked(own).state_dict().keys() == own.state_dict().keys()


def test_other_models_stay_as_they_are() -> None:
    model = built(TAKEN["qwen2"])
    names = [*model.state_dict()]
    assert [*unpacked(model).state_dict()] == names
    assert not [*routers(model)]


def test_experts_without_tokens_are_called_only_for_hooks() -> None:
    model = unpacked(built(TAKEN["mixtral"]))
    experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    rows, calls = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), []
    chosen, factors = torch.tensor([[0, 2]] * 3), torch.ones(3, 2)
    wanted = experts(rows, chosen, factors)
    for number, expert in enumerate(experts):
        expert.w1.register_forward_pre_hook(lambda _, args, number=number: calls.append((number, len(args[0]))))
    assert torch.equal(experts(rows, chosen, factors), wanted)
    assert calls == [(0, 3), (1, 0), (2, 3), (3, 0)]
