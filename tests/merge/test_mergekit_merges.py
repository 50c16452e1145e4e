"""Oracles: for the files in tests/merge/mergekit, the formulas of their methods on the models' own tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from hydra import compose, initialize_config_dir
from torch import Tensor

from epmq_cli.commands.merge import merge
from epmq_cli.commands.mergekit import replaced
from epmq_cli.commands.overrides import addable
from epmq_cli.config.instantiate import conf_dir
from tests.helpers.mergekit import FILES, models, written

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about deprecated features of transformers
Y = "model.layers.{}.{}.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    models(made)
    return made


@cache
def opened(path: Path) -> Any:
    return t.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tensor(path: Path, name: str) -> Tensor:
    found: Tensor = opened(path).get_parameter(name).detach()
    return found


def merged(name: str, folder: Path, run: Path) -> Path:
    """The checkpoint of a file."""
    overrides = addable(replaced("merge", ["merge=mergekit", f"merge.file={written(FILES / name, folder)}"]))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("merge", overrides=[*overrides, "out=unused"])
    run.mkdir()
    merge(cfg, run, overrides)
    return run / "checkpoint"


def test_gradients(folder: Path, tmp_path: Path) -> None:
    found = merged("gradient.yml", folder, tmp_path / "run")
    for name, weight in (
        *((Y.format(layer, "mlp.up_proj"), 0.2 + 0.8 * layer / 3) for layer in range(4)),
        ("model.embed_tokens.weight", 0.2),
        ("lm_head.weight", 0.2),
    ):
        base, first, second = (tensor(folder / model, name) for model in ("BASE", "FIRST", "SECOND"))
        torch.testing.assert_close(tensor(found, name), base + 0.8 * (weight * (first - base) + 0.5 * (second - base)))


def test_filters(folder: Path, tmp_path: Path) -> None:
    found = merged("filters.yml", folder, tmp_path / "run")
    places = {
        Y.format(0, "self_attn.q_proj"): 0,
        Y.format(3, "self_attn.q_proj"): 1,
        Y.format(1, "self_attn.o_proj"): 0.5 * 2 / 3 + 0.3 / 3,
        Y.format(0, "mlp.gate_proj"): 1,
        Y.format(2, "mlp.down_proj"): 0.7 / 3 + 0.3 * 2 / 3,
        Y.format(2, "input_layernorm"): 0.5,
        "model.norm.weight": 0.5,
    }
    for name, place in places.items():
        base, first = (tensor(folder / model, name).double() for model in ("BASE", "FIRST"))
        angle = torch.arccos((base * first).sum() / (base.norm() * first.norm()))
        sines = torch.sin((1 - place) * angle) / torch.sin(angle), torch.sin(place * angle) / torch.sin(angle)
        linear = torch.cos(angle) > 0.9995
        wanted = (1 - place) * base + place * first if linear else sines[0] * base + sines[1] * first
        torch.testing.assert_close(tensor(found, name), wanted.float())


def test_slices(folder: Path, tmp_path: Path) -> None:
    found = merged("slices.yml", folder, tmp_path / "run")
    layers = [("FIRST", 0), ("FIRST", 1), ("FIRST", 2), ("FIRST", 2), *(("SECOND", index) for index in (1, 2, 3))]
    assert opened(found).config.num_hidden_layers == len(layers)
    for index, (model, layer) in enumerate(layers):
        for part in ("mlp.up_proj", "self_attn.o_proj"):
            scale = 0 if index == 3 and part.endswith("o_proj") else 1
            own = tensor(folder / model, Y.format(layer, part))
            assert torch.equal(tensor(found, Y.format(index, part)), scale * own)
    assert torch.equal(tensor(found, "lm_head.weight"), tensor(folder / "SECOND", "lm_head.weight"))


def test_union(folder: Path, tmp_path: Path) -> None:
    """Where only one model differs from the base in a token, TIES with its weight alone is that model's row."""
    found = merged("union.yml", folder, tmp_path / "run")
    tokenizer, others = t.AutoTokenizer.from_pretrained(found), t.AutoTokenizer.from_pretrained(folder / "TOKENS")
    ids, own = tokenizer.get_vocab(), others.get_vocab()
    assert len(ids) == opened(found).config.vocab_size == 32 + 2 + 2 + 1
    rows, theirs = (tensor(path, "model.embed_tokens.weight") for path in (found, folder / "TOKENS"))
    for token in ("<|im_start|>", "pink"):  # all models have the row of TOKENS, so the task vectors are zero
        torch.testing.assert_close(rows[ids[token]], theirs[own[token]])
    base = tensor(folder / "BASE", "model.embed_tokens.weight")
    torch.testing.assert_close(rows[ids["<|extra|>"]], base[4])
    messages = [{"role": "user", "content": "red"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"


def test_adapters(folder: Path, tmp_path: Path) -> None:
    """Of the base and of another model, each as PEFT merges them."""
    found = merged("lora.yml", folder, tmp_path / "run")
    wholes = []
    for name in ("BASE", "FIRST"):
        model = t.AutoModelForCausalLM.from_pretrained(folder / name)
        wholes.append(peft.PeftModel.from_pretrained(model, folder / "ADAPTER").merge_and_unload())
    for name, weight in ((Y.format(1, "mlp.down_proj"), 0.25), (Y.format(1, "self_attn.q_proj"), 0.5)):
        base, first = (model.get_parameter(name).detach() for model in wholes)
        wanted = ((base + weight * first) / (1 + weight)).half()
        torch.testing.assert_close(tensor(found, name), wanted.float(), rtol=0, atol=2e-4)
    assert t.AutoConfig.from_pretrained(found).dtype == torch.float16
