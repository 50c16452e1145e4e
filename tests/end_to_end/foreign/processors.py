"""The axis "processors": differences between an expert's own tokenizer or image processor and the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.end_to_end.foreign.kinds import Kind, quiet
from tests.helpers.minihub import VOCABULARY

SPECIAL = 5  # number of tokens in the vocabulary that are not words
DIFFERS = "the expert's own processor is used for its task, or the difference is refused with both values"
Write = Callable[[Path, Path], None]
"""Writes the processor of an expert, given the folder of the base."""


def write_tokenizer(
    folder: Path, words: Sequence[str] = VOCABULARY, lower: bool = False, end: str | None = "</s>"
) -> None:
    """Writes a tokenizer of whole words, numbered as in `words`, that ends texts with `end`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        made.normalizer = normalizers.Lowercase()
    single = f"<s> $A {end}" if end else "<s> $A"
    special = [(token, numbers[token]) for token in ("<s>", *([end] if end else []))]
    made.post_processor = processors.TemplateProcessing(single, pair=f"{single} $B", special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=made, **names, padding_side="right").save_pretrained(folder)


def write_pixels(folder: Path, **options: Any) -> None:
    """Writes an image processor."""
    from transformers import ViTImageProcessor

    with quiet():
        ViTImageProcessor(size={"height": 16, "width": 16}, **options).save_pretrained(folder)


@dataclass(frozen=True)
class Processor:
    """`write`: writes an expert's processor. `pictures`: whether it processes images. `capitals`: whether the task's
    texts have capital letters. `may_be_refused`: why a refusal is correct too, if it is."""

    write: Write
    pictures: bool = False
    capitals: bool = False
    may_be_refused: str | None = None
    only: Callable[[Kind], bool] = lambda kind: True

    def applies(self, kind: Kind) -> bool:
        """Whether models of a kind can have such a processor."""
        return self.pictures == (kind.name in ("vit", "clip")) and self.only(kind)


def _roberta(kind: Kind) -> bool:
    return kind.name == "roberta"


def _classifier(kind: Kind) -> bool:
    return kind.has_labels


def _same(base: Path, expert: Path) -> None:
    for path in base.glob("*"):
        if path.name not in ("config.json", "generation_config.json") and path.suffix != ".safetensors":
            shutil.copyfile(path, expert / path.name)


def _absent(base: Path, expert: Path) -> None:
    pass


def _lowercasing(base: Path, expert: Path) -> None:
    write_tokenizer(expert, lower=True)


def _endless(base: Path, expert: Path) -> None:
    write_tokenizer(expert, end=None)


def _ends_otherwise(base: Path, expert: Path) -> None:
    write_tokenizer(expert, end="<mask>")


def _numbered_otherwise(base: Path, expert: Path) -> None:
    write_tokenizer(expert, [*VOCABULARY[:SPECIAL], *reversed(VOCABULARY[SPECIAL:])])


def _other_keys(base: Path, expert: Path) -> None:
    """The same settings, written by another version of transformers."""
    _same(base, expert)
    path = expert / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": False, "extra": 1}))


def _pairs(words: Sequence[str]) -> Write:
    """Only vocab.json and merges.txt, like old folders of RoBERTa."""

    def write(base: Path, expert: Path) -> None:
        (expert / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (expert / "merges.txt").write_text("#version: 0.2\n")
        (expert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))

    return write


LETTERS = [*VOCABULARY[:SPECIAL], *"abcdefghijklmnoprstuvwxyĠ"]
TURNED = [*LETTERS[:SPECIAL], *reversed(LETTERS[SPECIAL:])]
PROCESSORS = {
    "same": Processor(_same),
    "absent": Processor(_absent),
    "other-keys": Processor(_other_keys),
    "lower-idle": Processor(_lowercasing),
    "lower": Processor(_lowercasing, capitals=True, may_be_refused=DIFFERS),
    "endless": Processor(_endless, may_be_refused=DIFFERS, only=_classifier),
    "ends-otherwise": Processor(_ends_otherwise, may_be_refused=DIFFERS, only=_classifier),
    "numbers": Processor(_numbered_otherwise, may_be_refused=DIFFERS),
    "merges": Processor(
        _pairs([*LETTERS[:SPECIAL], *reversed(LETTERS[SPECIAL:])]), may_be_refused=DIFFERS, only=_roberta
    ),
    "merges-same": Processor(_pairs(LETTERS), only=_roberta),
    "pixels-same": Processor(_same, pictures=True),
    "pixels-absent": Processor(_absent, pictures=True),
    "pixels-mean": Processor(
        lambda base, expert: write_pixels(expert, image_mean=[0.1, 0.3, 0.6], image_std=[0.2, 0.3, 0.9]),
        pictures=True,
        may_be_refused=DIFFERS,
    ),
    "pixels-raw": Processor(
        lambda base, expert: write_pixels(expert, do_normalize=False), pictures=True, may_be_refused=DIFFERS
    ),
    "pixels-defaults": Processor(
        lambda base, expert: write_pixels(expert, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]), pictures=True
    ),
}


def write_base(kind: Kind, processor: str, folder: Path) -> None:
    """Writes the base's own processor. If the expert's processor has files of another kind, so does the base's."""
    if processor.startswith("merges"):
        return _pairs(LETTERS)(folder, folder)
    if kind.name in ("vit", "clip"):
        write_pixels(folder)
    if kind.name != "vit":
        write_tokenizer(folder)
    return None
