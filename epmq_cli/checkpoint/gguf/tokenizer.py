"""The tokenizer of a checkpoint as llama.cpp reads it: tokens with their kinds, merges, and how texts are split first.

llama.cpp knows splits by name. Only tokenizers by byte-level BPE whose split has a name are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmq_cli.errors import ConfigError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""The names of splits by their regular expression."""
UNKNOWN = "llama.cpp has no name for the way in which this tokenizer splits texts"


def write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Writes the tokenizer of a folder with a writer of the package gguf. `size`: the rows of the embeddings.
    ConfigError if llama.cpp has no such tokenizer."""
    from gguf import SpecialVocab

    content = tokenizer_json(folder)
    pre = split_name(folder, content)
    tokens, kinds = tokens_of(content, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def tokenizer_json(folder: Path) -> Mapping[str, Any]:
    """The content of tokenizer.json. ConfigError if there is none, or no byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"GGUF needs the tokenizer.json of a byte-level BPE, and {folder} has none")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model.get("byte_fallback") else str(model.get("type"))
        raise ConfigError(f"GGUF is written for tokenizers by byte-level BPE, got {kind} in {path}")
    return content


def split_name(folder: Path, content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer splits texts."""
    given = content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers") or [given]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        regex = (steps[0].get("pattern") or {}).get("Regex")
        if regex in SPLITS and steps[0].get("behavior") == "Isolated":
            return SPLITS[regex]
    raise ConfigError(f"{UNKNOWN}, got {' and '.join(map(str, kinds))} in {folder / 'tokenizer.json'}")


def tokens_of(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every row of the embeddings; rows without a token get a name that no text has."""
    from gguf import TokenType

    texts = {int(number): text for text, number in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for added in content.get("added_tokens") or ():
        texts[int(added["id"])] = added["content"]
        kinds[int(added["id"])] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(texts) >= size:
        raise ConfigError(f"the tokenizer has {max(texts) + 1} tokens, but the embeddings have {size} rows")
    rows = range(size)
    return [texts.get(row, f"[PAD{row}]") for row in rows], [int(kinds.get(row, TokenType.UNUSED)) for row in rows]
