"""The files beside a model's weights from which transformers makes its tokenizer, its processors and its generation
settings: which they are, copies of them, and whether a copy makes what the original makes.

What a tokenizer reads is what its class says (`vocab_files_names`). Files that engines beside transformers read, such
as the `tokenizer.model` of llama.cpp, are known by the shape of their names.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from epmq_cli.errors import CheckpointError, ModelError, first_line
from epmq_cli.models.answers import kept_answer
from epmq_cli.models.model_folder import CODE, WEIGHTS, read_json
from epmq_cli.models.pretrained import from_folder
from epmq_cli.runtime.links import leaves
from epmq_cli.store.hashing import content

TOKENIZER = (
    "tokenizer*",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "*.tokenizer",
    "tekken.json",
)
TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja")
OTHERS = (
    "added_tokens.json",
    "special_tokens_map.json",
    *TEMPLATES,
    "audio_tokenizer_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
PICTURES, COMBINED = "preprocessor_config.json", "processor_config.json"
LARGEST = 256 << 20  # bytes of a file that a tokenizer may read
PROBE = "The quick brown fox, 12345 jumps!\n  \u00c4\u00f6\u00fc \u4f60\u597d  Over."
"""A text of letters in both cases, digits, spaces, accents and another script."""


class ProcessorFiles:
    """The tokenizer and the image processor or feature extractor of a base, and the files that they are made from.

    ModelError where the base has files of one of them and transformers cannot load it: a checkpoint could not, either.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        known = [name for name in own_files(base) if matches(name, TOKENIZER)]
        self._loaded = _loaded(
            base, tokenizer=bool(known or _other_names(base)), pictures=bool({PICTURES, COMBINED} & {*own_files(base)})
        )
        if known and self._loaded.tokenizer is None:
            raise ModelError(
                f"base: {base} has files of a tokenizer ({', '.join(known[:3])}) in which transformers finds no words; "
                f"{_REMEDY}"
            )

    @property
    def files(self) -> list[str]:
        """The files by their paths in the base's folder, in order. ModelError where one is a link out of it."""
        read = self._loaded.vocabulary
        found = [name for name in own_files(self._base) if name in read or matches(name, (*TOKENIZER, *OTHERS))]
        for name in found:
            if leaves(self._base / name, self._base):
                raise ModelError(f"base: {self._base / name} is a link out of its folder; put the file itself there")
        return found

    def copy(self, folder: Path) -> None:
        """Copies the files into a checkpoint folder that has its config.json; CheckpointError where transformers does
        not make of them what it makes of the base's."""
        for name in self.files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._base / name, folder / name)
        before = self._loaded
        try:
            after = _loaded(folder, tokenizer=before.tokenizer is not None, pictures=before.pictures is not None)
        except ModelError as error:
            raise CheckpointError(f"the checkpoint is not written, since {error}") from error
        if (after.tokenizer, after.pictures) != (before.tokenizer, before.pictures):
            what = "tokenizer" if after.tokenizer != before.tokenizer else "image processor"
            raise CheckpointError(
                f"the checkpoint is not written, since transformers makes another {what} of its files than of those in "
                f"{self._base}; save the base's again with save_pretrained, and give that folder"
            )


@dataclass(frozen=True)
class _Loaded:
    """What transformers makes of a folder: a digest of what tells its tokenizer from others, None without one; the
    files that tokenizers of its class read; and the class of its image processor or feature extractor."""

    tokenizer: str | None
    vocabulary: tuple[str, ...]
    pictures: str | None


def _loaded(folder: Path, tokenizer: bool, pictures: bool) -> _Loaded:
    """The answer of transformers, now or for the same files earlier; ModelError where it cannot load them."""

    def ask() -> list[Any]:
        found = _tokenizer(folder) if tokenizer else None
        own = None if found is None else hashlib.sha256(repr(_read(found)).encode()).hexdigest()
        processor = _pictures(folder) if pictures else None
        kind = None if processor is None else f"{type(processor).__module__}.{type(processor).__name__}"
        return [own, sorted(_vocabulary_files(found, folder)), kind]

    files = {name: _identity(folder / name) for name in own_files(folder)}
    own, vocabulary, kind = kept_answer({"loaded": files, "asked": [tokenizer, pictures]}, ask, __file__)
    return _Loaded(own, tuple(vocabulary), kind)


def _identity(path: Path) -> str | list[int]:
    """The sha256 of a file; of one that is too large for a tokenizer's, its size and date."""
    state = path.stat()
    return content(path).sha256 if state.st_size <= LARGEST else [state.st_size, state.st_mtime_ns]


_REMEDY = "put its files there, or take all of them out to merge the weights alone"


def own_files(folder: Path) -> Iterator[str]:
    """The files of a folder and of its chat templates that are neither weights nor code, hidden ones left out."""
    paths = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    for path in sorted(paths):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (*WEIGHTS, *CODE):
            yield path.relative_to(folder).as_posix()


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.endswith(".safetensors") and any(fnmatch(name, pattern) for pattern in patterns)


def _other_names(folder: Path) -> list[str]:
    """Files of unknown purpose; a tokenizer may read one of them."""
    known = (*OTHERS, "config.json", "*.safetensors", "*.index.json", "*.md", "LICENSE*", "NOTICE*", "*_state.json")
    return [name for name in own_files(folder) if not any(fnmatch(name, pattern) for pattern in known)]


def _tokenizer(folder: Path) -> Any | None:
    """The tokenizer; None where the folder has none or one without words. ModelError where it cannot be loaded."""
    from transformers import AutoTokenizer

    marked = any(matches(name, TOKENIZER) for name in own_files(folder))
    try:
        found = from_folder(AutoTokenizer, folder)
    except ModelError as error:
        if not marked:
            return None
        reason = error.__cause__ or error
        code = "trust_remote_code" in str(reason)
        why = "it needs code of its own, which epmq never runs" if code else first_line(reason)
        raise ModelError(f"the tokenizer in {folder} does not load in transformers ({why}); {_REMEDY}") from error
    return found if has_words(found) else None


def has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer knows words: without a vocabulary transformers makes an empty one, to which every word is
    unknown."""
    special = set(tokenizer.all_special_tokens)
    return any(word not in special and word.strip("\u2581 ") for word in tokenizer.get_vocab())


def _pictures(folder: Path) -> Any | None:
    """The image processor, or the feature extractor where the settings are those of one; None where the folder has
    neither. ModelError where it cannot be loaded."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    combined = folder / COMBINED
    nested = read_json(folder, COMBINED, "base") if combined.is_file() else {}
    if not (folder / PICTURES).is_file() and not {"image_processor", "feature_extractor"} & {*nested}:
        return None
    try:
        return from_folder(AutoImageProcessor, folder)
    except ModelError as error:
        try:
            return from_folder(AutoFeatureExtractor, folder)
        except ModelError:
            raise error from None


def _vocabulary_files(tokenizer: Any | None, folder: Path) -> set[str]:
    """What the classes of a tokenizer read: of the one that was loaded, and of the one that its settings name."""
    if tokenizer is None:
        return set()
    path = folder / "tokenizer_config.json"
    named = str(read_json(folder, path.name, "base").get("tokenizer_class")) if path.is_file() else ""
    kinds = [type(tokenizer), *map(_class, (named, f"{named}Fast"))]
    bases = [base for kind in kinds if kind is not None for base in kind.__mro__]
    return {str(file) for base in bases for file in vars(base).get("vocab_files_names", {}).values()}


def _class(name: str) -> type | None:
    """The class of a tokenizer; None where transformers has none of this name, or not what it needs."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        found: type | None = tokenizer_class_from_name(name)
        return found if found is not None and found.__mro__ else None
    except ImportError:
        return None


def _read(tokenizer: Any | None) -> Any:
    """What tells two tokenizers apart: their class and template, and their rules, or their words and the tokens of a
    text where those are in Python."""
    if tokenizer is None:
        return None
    rules = getattr(tokenizer, "backend_tokenizer", None)
    found: list[Any] = [f"{type(tokenizer).__module__}.{type(tokenizer).__name__}", tokenizer.chat_template]
    if rules is not None:
        return [*found, rules.to_str()]
    try:
        ids = tokenizer(PROBE)["input_ids"]
    except Exception as error:  # one that reads no plain text, such as that of a table
        ids = [type(error).__name__]
    return [*found, sorted(tokenizer.get_vocab().items(), key=repr), ids]
