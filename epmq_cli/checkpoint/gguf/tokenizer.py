"""The tokenizer of a checkpoint as llama.cpp reads it: tokens with their kinds, and what merges them.

- Byte-level BPE (`gpt2`): texts are split in a way that llama.cpp knows by name, then pairs merge in their order.
- BPE of SentencePiece (`llama`), whose tokens mark spaces with ▁: each token has a score, and of all pairs of
  neighbours that make a token, the one with the highest score merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from epmq_cli.errors import ConfigError
from epmq_cli.models.pretrained import from_folder

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
SPLITS = {
    (THREE_DIGITS, True): "llama-bpe",
    (THREE_DIGITS, False): "dbrx",
    (rf"{WORDS}|\p{{N}}|{REST}", False): "qwen2",
}
"""The names of splits by their regular expression, and whether words that are tokens stay whole."""
UNKNOWN = "llama.cpp has no name for the way in which this tokenizer splits texts"
SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NEVER = -1e9
"""The score of tokens that nothing merges into."""


def write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Writes the tokenizer of a folder with a writer of the package gguf. `size`: the rows of the embeddings.
    ConfigError if llama.cpp has no such tokenizer."""
    from gguf import SpecialVocab

    content = tokenizer_json(folder)
    pieces = bool(content["model"].get("byte_fallback"))
    tokens, kinds = tokens_of(content, size)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(space_prefix(folder, content))
        writer.add_token_scores(scores(content, tokens))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(folder, content))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    special.add_special_token |= added_ends(folder)
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(folder: Path) -> None:
    """ConfigError if llama.cpp has no tokenizer like that of the folder."""
    content = tokenizer_json(folder)
    if content["model"].get("byte_fallback"):
        space_prefix(folder, content)
    else:
        split_name(folder, content)


def added_ends(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts its tokens for begin and end around texts; llama.cpp has defaults of its own."""
    from transformers import AutoTokenizer

    tokenizer = from_folder(AutoTokenizer, folder)
    tokens = tokenizer("a")["input_ids"]
    return {"bos": tokens[0] == tokenizer.bos_token_id, "eos": tokens[-1] == tokenizer.eos_token_id}


def tokenizer_json(folder: Path) -> Mapping[str, Any]:
    """The content of tokenizer.json. ConfigError if there is none, or no BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"GGUF needs the tokenizer.json of a BPE, and {folder} has none")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ConfigError(f"GGUF is written for tokenizers by BPE, got {model.get('type')} in {path}")
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
        regex = str((steps[0].get("pattern") or {}).get("Regex"))
        name = SPLITS.get((regex, bool(content["model"].get("ignore_merges"))))
        if name and steps[0].get("behavior") == "Isolated":
            return name
    raise ConfigError(f"{UNKNOWN}, got {' and '.join(map(str, kinds))} in {folder / 'tokenizer.json'}")


def space_prefix(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether SentencePiece puts a space in front of texts. ConfigError if it changes texts otherwise."""
    given = content.get("normalizer") or {}
    steps = list(given.get("normalizers") or ([given] if given else []))
    split = content.get("pre_tokenizer") or {}
    if split.get("type") == "Metaspace" and not split.get("split", True) and split.get("replacement") == SPACE:
        if not steps:
            return bool(split.get("prepend_scheme", "always") != "never")
    elif not split or _splits_at(split, " "):
        prefix = steps[0] == {"type": "Prepend", "prepend": SPACE} if steps else False
        if steps[prefix:] == [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]:
            return prefix
    raise ConfigError(f"{UNKNOWN}, see normalizer and pre_tokenizer in {folder / 'tokenizer.json'}")


def _splits_at(split: Mapping[str, Any], text: str) -> bool:
    return split.get("type") == "Split" and split.get("pattern") == {"String": text}


def scores(content: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """The scores of all tokens: of those that pairs merge into, minus the place of these pairs among all merges.
    ConfigError if no scores give the order of the merges."""
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    order = [text for text, _ in groupby("".join(pair) for pair in pairs)]
    places = {text: place for place, text in enumerate(order)}
    added = {token["content"] for token in content.get("added_tokens") or ()}  # which are taken out of texts first
    known, made = set(content["model"]["vocab"]) - added, set(pairs)
    whole = len(places) == len(order) and all(
        (text[:cut], text[cut:]) in made
        for text in known
        if not BYTE.fullmatch(text)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )
    if not whole:
        raise ConfigError(
            "llama.cpp merges every pair that makes a token, and this tokenizer with byte fallback does not; use a "
            "tokenizer that SentencePiece made"
        )
    return [float(-places[text]) if text in places else NEVER for text in tokens]


def tokens_of(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every row of the embeddings; rows without a token get a name that no text has."""
    from gguf import TokenType

    model = content["model"]
    texts = {int(number): text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    if model.get("byte_fallback"):
        kinds |= {number: TokenType.BYTE for number, text in texts.items() if BYTE.fullmatch(text)}
    for added in content.get("added_tokens") or ():
        texts[int(added["id"])] = added["content"]
        kinds[int(added["id"])] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if (unknown := model.get("unk_token")) in model["vocab"]:
        kinds[int(model["vocab"][unknown])] = TokenType.UNKNOWN
    if max(texts) >= size:
        raise ConfigError(f"the tokenizer has {max(texts) + 1} tokens, but the embeddings have {size} rows")
    rows = range(size)
    return [texts.get(row, f"[PAD{row}]") for row in rows], [int(kinds.get(row, TokenType.UNUSED)) for row in rows]
