"""Oracles: layers stacked by hand in transformers, and the method itself on the layers of a slice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from epmq_cli.errors import ConfigError
from epmq_cli.merge.passthrough import Passthrough
from epmq_cli.merge.slices import Slices
from tests.commands.test_merge import merged
from tests.conftest import TASKS, write_suite
from tests.helpers.hubs import config
from tests.helpers.minihub import IDS, SIZE, decoder_hub, models, t5_hub, texts, tokenizer

AVERAGE = {"_target_": "epmq_cli.merge.average.Average"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with four layers, one kind of attention in each."""
    folder = tmp_path_factory.mktemp("four")
    sizes = {**SIZE, **IDS, "num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    torch.manual_seed(0)
    made = t.Qwen3ForCausalLM(
        t.Qwen3Config(**sizes, head_dim=16, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    ).eval()
    models(folder, made)
    tokenizer(folder / "base", end=False)
    entries = texts(folder, metric="perplexity")
    write_suite(folder, {"family": "causal_lm", "base": str(folder / "base"), "tasks": entries})
    return folder


def opened(folder: Path) -> Any:
    return t.AutoModelForCausalLM.from_pretrained(folder).eval()


def option(slices: list[dict[str, Any]]) -> str:
    return "merge.slices=" + json.dumps(slices).replace('"', "")


def test_passthrough_stacks_layers_as_by_hand(hub: Path, tmp_path: Path) -> None:
    """Layers 0 to 2 of the first model and 1 to 3 of the second."""
    slices = [{"expert": TASKS[0], "layers": [0, 3]}, {"expert": TASKS[1], "layers": [1, 4]}]
    found = opened(merged(hub, tmp_path / "run", "merge=passthrough", option(slices)))
    first, second = opened(hub / TASKS[0]), opened(hub / TASKS[1])
    by_hand = copy.deepcopy(first)
    by_hand.model.layers = nn.ModuleList([*first.model.layers[:3], *second.model.layers[1:]])
    by_hand.model.norm, by_hand.lm_head = second.model.norm, second.lm_head
    assert found.config.num_hidden_layers == 6
    assert found.config.layer_types == [first.config.layer_types[index] for index in (0, 1, 2, 1, 2, 3)]
    wanted = by_hand.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    by_hand.config = found.config
    by_hand.model.config = found.config
    for index, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = index
    ids = torch.tensor([[1, 7, 9, 11, 8, 3]])
    assert torch.equal(found(ids, use_cache=False).logits, by_hand(ids, use_cache=False).logits)


def test_a_scale_of_zero_makes_a_repeated_layer_an_identity(hub: Path, tmp_path: Path) -> None:
    """Layer 2 is repeated with its outputs at 0, as in block expansion: the model's outputs stay the same."""
    zero = [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]
    slices = [
        {"expert": TASKS[0], "layers": [0, 3]},
        {"expert": TASKS[0], "layers": [2, 3], "scale": zero},
        {"expert": TASKS[0], "layers": [3, 4]},
    ]
    found = opened(merged(hub, tmp_path / "run", "merge=passthrough", option(slices)))
    ids = torch.tensor([[1, 7, 9, 11, 8, 3]])
    assert found.config.num_hidden_layers == 5
    assert torch.equal(found(ids).logits, opened(hub / TASKS[0])(ids).logits)


def averaged(folder: Path, layers: dict[str, int], rest: str) -> Tensor:
    """The mean of the tensors `rest` of some layers, by task."""
    own = [opened(folder / task).model.layers[index].get_parameter(rest) for task, index in layers.items()]
    return torch.stack(own).mean(0)


def test_a_slice_merges_its_own_layers_with_its_own_method(hub: Path, tmp_path: Path) -> None:
    first, second = TASKS
    gradient = {"_target_": "epmq_cli.merge.average.Average", "weights": {second: [0, 3]}}
    slices = [
        {"experts": {first: [0, 2], second: [2, 4]}, "merge": AVERAGE},
        {"experts": {first: [1, 4], second: [1, 4]}, "base": [1, 4], "merge": gradient},
    ]
    checkpoint = merged(hub, tmp_path / "run", "merge=slices", option(slices))
    found, rest = opened(checkpoint), "mlp.up_proj.weight"
    layers = [layer.get_parameter(rest) for layer in found.model.layers]
    torch.testing.assert_close(layers[1], averaged(hub, {first: 1, second: 3}, rest))
    torch.testing.assert_close(layers[2], averaged(hub, {first: 1}, rest))  # the gradient begins in its slice
    torch.testing.assert_close(
        layers[3], (averaged(hub, {first: 2}, rest) + 1.5 * averaged(hub, {second: 2}, rest)) / 2.5
    )
    assert len(layers) == 5
    wanted = (opened(hub / first).lm_head.weight + 3 * opened(hub / second).lm_head.weight) / 4
    torch.testing.assert_close(found.lm_head.weight, wanted)


def test_all_layers_in_one_slice_are_the_merge_itself(tmp_path: Path) -> None:
    for kind in ("llama", "gemma3"):  # gemma3 ties its tables
        hub = decoder_hub(tmp_path / kind, kind)
        slices = [{"experts": {task: [0, 2] for task in TASKS}, "merge": AVERAGE}]
        found = opened(merged(hub, tmp_path / f"{kind}-slices", "merge=slices", option(slices)))
        wanted = opened(merged(hub, tmp_path / f"{kind}-plain", "merge=average"))
        assert found.config.to_dict() == {**wanted.config.to_dict(), "_name_or_path": found.config._name_or_path}
        assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_modules_name_the_stacks_of_a_model(tmp_path: Path) -> None:
    hub = t5_hub(tmp_path / "hub")
    decoder = f"[{{expert: {TASKS[1]}, layers: [0, 1]}}, {{expert: {TASKS[0]}, layers: null}}]"
    slices = f"merge.slices={{encoder: [{{expert: {TASKS[0]}, layers: null}}], decoder: {decoder}}}"
    checkpoint = merged(hub, tmp_path / "run", "merge=passthrough", slices)
    found = t.T5ForConditionalGeneration.from_pretrained(checkpoint)
    first, second = (t.T5ForConditionalGeneration.from_pretrained(hub / task) for task in TASKS)
    assert (found.config.num_layers, found.config.num_decoder_layers) == (2, 3)
    name = "decoder.block.{}.layer.2.DenseReluDense.wo.weight"
    for index, (model, own) in enumerate(((second, 0), (first, 0), (first, 1))):
        assert torch.equal(found.get_parameter(name.format(index)), model.get_parameter(name.format(own)))
    assert torch.equal(found.encoder.final_layer_norm.weight, first.encoder.final_layer_norm.weight)


def test_the_tensors_of_a_first_layer_alone_stay_in_the_first_layer(tmp_path: Path) -> None:
    """T5's position biases, which the second layer reads too."""
    hub = t5_hub(tmp_path / "hub")
    whole = f"[{{expert: {TASKS[0]}, layers: null}}]"
    encoder = f"[{{expert: {TASKS[1]}, layers: [1, 2]}}, {{expert: {TASKS[0]}, layers: [0, 1]}}]"
    slices = f"merge.slices={{encoder: {encoder}, decoder: {whole}}}"
    found = t.T5ForConditionalGeneration.from_pretrained(merged(hub, tmp_path / "run", "merge=passthrough", slices))
    first, second = (t.T5ForConditionalGeneration.from_pretrained(hub / task) for task in TASKS)
    biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(found.get_parameter(biases), second.get_parameter(biases))
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    for index, (model, own) in enumerate(((second, 1), (first, 0))):
        assert torch.equal(found.get_parameter(name.format(index)), model.get_parameter(name.format(own)))


def test_an_image_encoder_gets_the_number_of_its_own_layers(clip_hub: Path, tmp_path: Path) -> None:
    """And not the text encoder, which has as many."""
    slices = [{"expert": TASKS[0], "layers": None}, {"expert": TASKS[1], "layers": [0, 1]}]
    found = t.CLIPModel.from_pretrained(merged(clip_hub, tmp_path / "run", "merge=passthrough", option(slices)))
    assert (found.config.vision_config.num_hidden_layers, found.config.text_config.num_hidden_layers) == (3, 2)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ("[{expert: first, layers: [0, 9]}]", r"takes layers 0 to 8 of model.layers, and the models have 4"),
        ("[{expert: frist, layers: [0, 1]}]", r"has no option 'frist', .* did you mean first\?"),
        ("[{expert: first, layers: [2, 2]}]", r"merge.slices\[0\].layers must be \[first, last \+ 1\]"),
        ("[{expert: first, layrs: [0, 1]}]", r"no option 'layrs', .* did you mean layers\?"),
        ("{vision: [{expert: first, layers: null}]}", r"stacks of layers \(model.layers\) .*, got vision"),
        ("[]", r"merge.slices must be a list of slices, got \[\]"),
        ("{}", r"merge.slices must name at least one slice"),
    ],
)
def test_wrong_slices_are_refused(slices: str, message: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(hub, tmp_path / "run", "merge=passthrough", f"merge.slices={slices}")


def test_slices_have_as_many_layers_of_each_model() -> None:
    with pytest.raises(ConfigError, match=r"as many layers of each model, got \[0, 2\], \[0, 3\]"):
        Slices([{"experts": {"a": [0, 2], "b": [0, 3]}, "merge": Passthrough()}])
    with pytest.raises(ConfigError, match=r"merge.slices\[0\].merge needs a _target_"):
        Slices([{"experts": {"a": [0, 2]}, "merge": "average"}])


def test_passthrough_of_several_experts_needs_slices(hub: Path) -> None:
    from epmq_cli.pipeline.job import make_job

    with pytest.raises(
        ConfigError, match="merge=passthrough takes one expert, or several with merge.slices; the suite"
    ):
        make_job(config(hub, "merge=passthrough"))
