"""Oracle: the outputs of the embedding table and the output layer of the trained PEFT model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from epmq_cli.errors import ModelError
from epmq_cli.models.open import open_base
from tests.models.lora.test_lora_kinds import DECODER, open_lora, save_trained

pytestmark = [  # PEFT warns about the options of these adapters
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
]

TIED: dict[str, dict[str, Any]] = {
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "table saved": {"modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head dora": {"target_modules": ["lm_head"], "use_dora": True},
    "both saved, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "table saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "table, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [2]}},
}


@pytest.mark.parametrize("stored_twice", [False, True], ids=["stored once", "stored twice"])
def test_on_a_tied_base_table_and_head_are_the_trained_ones(stored_twice: bool, tmp_path: Path) -> None:
    """Oracle: the outputs of the trained model's table and output layer for ids and hidden states.

    PEFT's merge_and_unload differs: it adds the LoRA of one of them to both, because they share their parameter.
    """
    torch.manual_seed(0)
    settings = {**DECODER, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "base")
    if stored_twice:
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    base = open_base(tmp_path / "base", "base")
    ids, states = torch.arange(20), torch.eye(16)
    for kind, options in TIED.items():
        folder = tmp_path / kind
        settings = {"target_modules": ["q_proj"], "init_lora_weights": False, **options}
        peft = save_trained(model, folder, **settings).eval()
        with torch.no_grad():
            table = peft.get_input_embeddings()(ids)
            head = peft.get_output_embeddings()(states).T
        expert = open_lora(folder, base)
        torch.testing.assert_close(expert.tensor("model.embed_tokens.weight").float(), table, rtol=1e-5, atol=2e-6)
        untied = not torch.allclose(table, head, atol=1e-5)
        assert ("lm_head.weight" in expert.infos) == (untied or stored_twice), kind
        if "lm_head.weight" in expert.infos:
            torch.testing.assert_close(expert.tensor("lm_head.weight").float(), head, rtol=1e-5, atol=2e-6)


def test_a_tied_table_that_training_did_not_change_stays_tied(tmp_path: Path) -> None:
    """PEFT adapts T5's `shared`, which neither encoder nor decoder calls, so its LoRA keeps its initial value."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["shared", "q"]))
    peft.save_pretrained(tmp_path / "adapter")
    base = open_base(tmp_path / "base", "base")
    expert = open_lora(tmp_path / "adapter", base)
    assert expert.infos.keys() == base.infos.keys()
    assert torch.equal(expert.tensor("shared.weight"), model.shared.weight)


def test_a_residual_of_a_tied_tensor_is_refused(tmp_path: Path) -> None:
    """PiSSA on a tied output layer also changes the table. PiSSA on a table changes only the LoRA."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, "tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base", "base")
    for module in ("lm_head", "embed_tokens"):
        save_trained(model, tmp_path / module, target_modules=["q_proj", module], init_lora_weights="pissa")
    assert "lm_head.weight" in open_lora(tmp_path / "embed_tokens", base).infos
    with pytest.raises(ModelError, match=r"changes the base's weights \(pissa\) on lm_head.weight, which is tied"):
        open_lora(tmp_path / "lm_head", base)
