"""Oracle: the order in which the modules of a model run, of every architecture in the helpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from epmq_cli.merge.mergekit_options import setting
from epmq_cli.merge.settings import LAYER, TensorSetting, layer_depths
from epmq_cli.models.routed_experts import unpacked
from tests.helpers.architectures import ENCODERS, REFUSED, TAKEN, Build, built
from tests.helpers.minihub import encoder_models, t5_models

OTHERS: dict[str, Build] = {"t5": t5_models}
OTHERS |= {
    kind: (lambda kind=kind: encoder_models(kind)) for kind in ("roberta", "deberta", "distilbert", "modernbert")
}
BUILDS = {**TAKEN, **{f"{kind} (refused)": build for kind, (build, _) in REFUSED.items()}, **ENCODERS, **OTHERS}
del BUILDS["albert"]  # its layers share their tensors


def run_order(model: Any) -> dict[str, float | None]:
    """For each tensor: 0 if its module runs before the first layer of its stack, None inside a layer, else 1.

    Stacks: the lists of layers that no other layer contains.
    """
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    ids = torch.tensor([[5, 7, 9, 11]])
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    model(**inputs)
    places: dict[str, float | None] = {}
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        near = max(stacks, key=lambda stack: shared(stack, name))
        start = calls.index(f"{near}.0")
        behind = calls.index(module) > start if module in calls else not is_table(model, module)
        places[name] = None if inside else float(behind)
    return places


def is_table(model: nn.Module, module: str) -> bool:
    """Whether a module that does not run is a table that others read, as in T5 and DeBERTa."""
    return isinstance(model.get_submodule(module), nn.Embedding)


def shared(one: str, other: str) -> int:
    """How many parts at the start of two names are the same."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), 9)


@pytest.mark.parametrize("kind", BUILDS)
@torch.inference_mode()
def test_tensors_outside_the_layers_have_the_depth_of_their_place(kind: str) -> None:
    """And mergekit's gradients their first value there."""
    places = run_order(unpacked(built(BUILDS[kind])))
    depths = layer_depths(places)
    assert {name: None if LAYER.match(name) else depths[name] for name in places} == places
    made = TensorSetting(setting("weight", [[0.25, 0.5, 1.0]], 1.0), 1.0, depths)
    outside = {name: made.at(name) for name, place in places.items() if place is not None}
    assert len(outside) > 1
    assert set(outside.values()) == {0.25}
    inside = {made.at(name) for name in places if name not in outside}
    assert inside == {0.25, 1.0}
