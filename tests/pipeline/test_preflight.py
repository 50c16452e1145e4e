"""Oracles: the divisors of a model's inputs, and the tensors that the steps of its family name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from epmq_cli.errors import ConfigError, ModelError
from epmq_cli.families import FAMILIES
from epmq_cli.pipeline.preflight import check_groups, check_parts
from tests.helpers.formats import ints
from tests.helpers.minihub import IDS

ENCODER = {"num_hidden_layers": 1, "vocab_size": IDS["vocab_size"], "hidden_size": 32, "intermediate_size": 64}


def llama(width: int, inner: int) -> Any:
    """A Llama with these input widths, on the meta device."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, **IDS))


@pytest.mark.parametrize(
    ("width", "inner", "said"),
    [
        (
            576,
            1536,
            "8, 12, 16, 24, 32, 48, 64, 96 or 192, or -1 (one group per row); the int4 kernels take 32, 64, 96 or ",
        ),
        (40, 80, "8, 10, 20 or 40, or -1 (one group per row); the int4 kernels take only multiples of 32"),
        (6, 10, "no group size divides the inputs of all linears of this model; use -1 (one group per row)"),
    ],
)
def test_the_possible_group_sizes_are_named(width: int, inner: int, said: str) -> None:
    """The common divisors of both input widths; 576 and 1536 are those of SmolLM2."""
    with pytest.raises(ConfigError) as found:
        check_groups(llama(width, inner), FAMILIES["causal_lm"], [ints(4, 128)])
    assert f"group_size=128 must divide the {width} inputs of model.layers.0.self_attn.q_proj; " in str(found.value)
    assert said in str(found.value)


def test_the_named_group_sizes_are_accepted() -> None:
    for size in (8, 12, 96, 192, -1):
        check_groups(llama(576, 1536), FAMILIES["causal_lm"], [ints(4, size)])


MODELS: dict[str, Any] = {
    "bert": lambda: t.BertModel(t.BertConfig(**ENCODER, num_attention_heads=4)),
    "deberta": lambda: t.DebertaV2Model(
        t.DebertaV2Config(**ENCODER, num_attention_heads=4, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**ENCODER, num_attention_heads=4), add_pooling_layer=False),
    "vit": lambda: t.ViTModel(t.ViTConfig(**{**ENCODER, "num_attention_heads": 4}), add_pooling_layer=False),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["parameter", "buffer", "module"])
def test_a_tensor_outside_the_steps_is_refused_by_name(family: str, kind: str) -> None:
    """The model is accepted unchanged, and refused with one more tensor in a block."""
    with torch.device("meta"):
        model = MODELS[family]()
        check_parts(model, FAMILIES[family])
        block = FAMILIES[family].blocks(model)[0]
        if kind == "parameter":
            block.module.register_parameter("gate", nn.Parameter(torch.ones(3)))
        elif kind == "buffer":
            block.module.register_buffer("gate", torch.ones(3))
        else:
            block.module.add_module("gate", nn.Conv1d(3, 3, 1))
    with pytest.raises(
        ModelError, match=f"^base: .* has {block.prefix}.gate.*, which is not in any step of the family; epmq run"
    ):
        check_parts(model, FAMILIES[family])


def test_buffers_that_are_not_stored_are_ignored() -> None:
    """Buffers that the config determines, such as rotary frequencies."""
    model = llama(32, 64)
    model.model.layers[0].register_buffer("gate", torch.ones(3), persistent=False)
    check_parts(model, FAMILIES["causal_lm"])
