"""Finds and copies the tokenizer, processor and generation config files of a model, and checks the copies.

The class of a tokenizer lists the files that it reads (`vocab_files_names`). Name patterns cover the files that other
inference engines read, such as the `tokenizer.model` of llama.cpp.
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
from epmq_cli.models.answers import cached_answer
from epmq_cli.models.headers import CODE, WEIGHTS, read_json
from epmq_cli.models.pretrained import from_folder
from epmq_cli.runtime.paths import leaves
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
LARGEST = 256 << 20  # bytes; larger files are not tokenizer files
PROBE = "The quick brown fox, 12345 jumps!\n  \u00c4\u00f6\u00fc \u4f60\u597d  Over."
"""A text with both letter cases, digits, whitespace, accents and a second script."""


class ProcessorFiles:
    """The tokenizer and the image processor or feature extractor of a base, and their files.

    Raises ModelError if the base has such files but transformers cannot load them, because a checkpoint would fail too.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        names = [name for name in own_files(base) if matches(name, TOKENIZER)]
        self._loaded = _loaded(
            base, tokenizer=bool(names or _other_names(base)), pictures=bool({PICTURES, COMBINED} & {*own_files(base)})
        )
        if names and self._loaded.tokenizer is None:
            raise ModelError(
                f"base: {base} has tokenizer files ({', '.join(names[:3])}) in which transformers finds no vocabulary; "
                f"{_REMEDY}"
            )

    @property
    def files(self) -> list[str]:
        """The sorted file paths, relative to the base's folder. Raises ModelError if a link leaves the folder."""
        vocabulary = self._loaded.vocabulary
        names = [name for name in own_files(self._base) if name in vocabulary or matches(name, (*TOKENIZER, *OTHERS))]
        for name in names:
            if leaves(self._base / name, self._base):
                raise ModelError(
                    f"base: {self._base / name} is a link out of its folder; replace the link with the file"
                )
        return names

    def copy(self, folder: Path) -> None:
        """Copies the files to a checkpoint folder that already has its config.json.

        Raises CheckpointError if transformers does not load the same tokenizer and image processor from the copies.
        """
        for name in self.files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._base / name, folder / name)
        before = self._loaded
        try:
            after = _loaded(folder, tokenizer=before.tokenizer is not None, pictures=before.pictures is not None)
        except ModelError as error:
            raise CheckpointError(f"the checkpoint cannot be written: {error}") from error
        if (after.tokenizer, after.pictures) != (before.tokenizer, before.pictures):
            what = "tokenizer" if after.tokenizer != before.tokenizer else "image processor"
            raise CheckpointError(
                f"the checkpoint cannot be written: transformers loads a different {what} from it than from "
                f"{self._base}; save the base's {what} again with save_pretrained and give that folder"
            )


@dataclass(frozen=True)
class _Loaded:
    """The tokenizer and processor that transformers loads from a folder.

    `tokenizer`: a digest of the tokenizer, or None. `vocabulary`: the files that tokenizers of its class read.
    `pictures`: the class of the image processor or feature extractor, or None.
    """

    tokenizer: str | None
    vocabulary: tuple[str, ...]
    pictures: str | None


def _loaded(folder: Path, tokenizer: bool, pictures: bool) -> _Loaded:
    """Loads a folder with transformers, or reads the cached answer for the same files. Raises ModelError on failure."""

    def ask() -> list[Any]:
        loaded = _tokenizer(folder) if tokenizer else None
        own = None if loaded is None else hashlib.sha256(repr(_read(loaded)).encode()).hexdigest()
        processor = _pictures(folder) if pictures else None
        kind = None if processor is None else f"{type(processor).__module__}.{type(processor).__name__}"
        return [own, sorted(_vocabulary_files(loaded, folder)), kind]

    files = {name: _identity(folder / name) for name in own_files(folder)}
    own, vocabulary, kind = cached_answer({"loaded": files, "asked": [tokenizer, pictures]}, ask, __file__)
    return _Loaded(own, tuple(vocabulary), kind)


def _identity(path: Path) -> str | list[int]:
    """The sha256 of a file, or its size and date if it is too large for a tokenizer file."""
    state = path.stat()
    return content(path).sha256 if state.st_size <= LARGEST else [state.st_size, state.st_mtime_ns]


_REMEDY = "add the missing files, or remove all files of the tokenizer to merge only the weights"


def own_files(folder: Path) -> Iterator[str]:
    """Yields the files of a folder and its chat templates, without weights, code and hidden files."""
    paths = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    for path in sorted(paths):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (*WEIGHTS, *CODE):
            yield path.relative_to(folder).as_posix()


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.endswith(".safetensors") and any(fnmatch(name, pattern) for pattern in patterns)


def _other_names(folder: Path) -> list[str]:
    """The files of unknown purpose, since a tokenizer may read them."""
    patterns = (*OTHERS, "config.json", "*.safetensors", "*.index.json", "*.md", "LICENSE*", "NOTICE*", "*_state.json")
    return [name for name in own_files(folder) if not any(fnmatch(name, pattern) for pattern in patterns)]


def _tokenizer(folder: Path) -> Any | None:
    """Loads the tokenizer; None if it is missing or empty. Raises ModelError if it does not load."""
    from transformers import AutoTokenizer

    marked = any(matches(name, TOKENIZER) for name in own_files(folder))
    try:
        tokenizer = from_folder(AutoTokenizer, folder)
    except ModelError as error:
        if not marked:
            return None
        reason = error.__cause__ or error
        code = "trust_remote_code" in str(reason)
        why = "it needs its own code, which epmq never runs" if code else first_line(reason)
        raise ModelError(f"the tokenizer in {folder} does not load in transformers ({why}); {_REMEDY}") from error
    return tokenizer if has_words(tokenizer) else None


def has_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has a vocabulary.

    Without vocabulary files, transformers creates an empty tokenizer that maps every word to the unknown token.
    """
    special = set(tokenizer.all_special_tokens)
    return any(word not in special and word.strip("\u2581 ") for word in tokenizer.get_vocab())


def _pictures(folder: Path) -> Any | None:
    """Loads the image processor or the feature extractor; None if the folder has neither.

    Raises ModelError if it does not load.
    """
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
    """The names of the files that the loaded tokenizer's class and the class in its config read."""
    if tokenizer is None:
        return set()
    path = folder / "tokenizer_config.json"
    named = str(read_json(folder, path.name, "base").get("tokenizer_class")) if path.is_file() else ""
    kinds = [type(tokenizer), *map(_class, (named, f"{named}Fast"))]
    bases = [base for kind in kinds if kind is not None for base in kind.__mro__]
    return {str(file) for base in bases for file in vars(base).get("vocab_files_names", {}).values()}


def _class(name: str) -> type | None:
    """The tokenizer class of this name; None if transformers lacks the class or a dependency of it."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        cls: type | None = tokenizer_class_from_name(name)
        return cls if cls is not None and cls.__mro__ else None
    except ImportError:
        return None


def _read(tokenizer: Any | None) -> Any:
    """The features that identify a tokenizer: its class, its chat template, and its rules.

    A tokenizer in pure Python has no rules to compare; its vocabulary and the tokens of a test text stand for them.
    """
    if tokenizer is None:
        return None
    rules = getattr(tokenizer, "backend_tokenizer", None)
    features: list[Any] = [f"{type(tokenizer).__module__}.{type(tokenizer).__name__}", tokenizer.chat_template]
    if rules is not None:
        return [*features, rules.to_str()]
    try:
        ids = tokenizer(PROBE)["input_ids"]
    except Exception as error:  # a tokenizer that does not accept plain text, such as one for tables
        ids = [type(error).__name__]
    return [*features, sorted(tokenizer.get_vocab().items(), key=repr), ids]
