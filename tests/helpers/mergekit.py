"""Small models for the mergekit files in tests/merge/mergekit, whose models are named in capitals."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers as t
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds

from tests.conftest import drifted

FILES = Path(__file__).parents[1] / "merge" / "mergekit"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "red", "green", "blue", *(f"word{index}" for index in range(25))]
OTHERS = ["<unk>", "green", "red", "<s>", "</s>", "<pad>", *WORDS[6:], "pink", "mauve"]
ADDED = ["<|im_start|>", "<|im_end|>"]
NAMES = ("BASE", "FIRST", "SECOND", "TOKENS", "ADAPTER")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def tokenizer(folder: Path, words: list[str], added: list[str]) -> None:
    """Writes a tokenizer of whole words."""
    made = Tokenizer(kinds.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    written = t.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    written.add_tokens(added, special_tokens=True)
    written.save_pretrained(folder)


def models(folder: Path) -> None:
    """Llamas with four layers: a base, two experts, one with other tokens in another order, and an adapter."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = t.LlamaConfig(**SIZE, **ids, vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    base = t.LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "BASE")
    for seed, name in enumerate(("FIRST", "SECOND")):
        drifted(base, seed).save_pretrained(folder / name)
    other = drifted(base, 2)
    other.resize_token_embeddings(len(OTHERS) + len(ADDED), mean_resizing=False)
    other.save_pretrained(folder / "TOKENS")
    for name in NAMES[:3]:
        tokenizer(folder / name, WORDS, [])
    tokenizer(folder / "TOKENS", OTHERS, ADDED)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "ADAPTER")


def written(file: Path, folder: Path) -> Path:
    """The file with the paths of the models in place of their names, in their folder."""
    text = file.read_text(encoding="utf-8")
    for name in NAMES:
        text = text.replace(name, str(folder / name))
    path = folder / file.name
    path.write_text(text, encoding="utf-8")
    return path
