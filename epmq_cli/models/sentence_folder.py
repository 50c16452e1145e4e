"""The folder of a sentence-transformers model (https://sbert.net): a transformer, its pooling, and layers behind it.

Imports no torch, which takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmq_cli.errors import ModelError, literal
from epmq_cli.models.headers import read_json
from epmq_cli.runtime.paths import escapes, leaves

LIST = "modules.json"
"""Names the modules of a model; other model folders do not have it."""
SETTINGS = "config_sentence_transformers.json"
READER = "sentence_*_config.json"
"""The settings of the transformer's inputs, beside it. Old models have the type of the transformer in this name."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRANSFORMER, POOLING, DENSE, NORMALIZE = "Transformer", "Pooling", "Dense", "Normalize"
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The kinds of pooling, by their settings in files from before sentence-transformers 6."""
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
DOCUMENTS = ("document", "passage", "corpus")
"""The names of the prompt of documents, the first one that a model has counts."""
LONGEST = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A layer behind the pooling: `Dense` or `Normalize`, its folder and its settings."""

    kind: str
    path: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SentenceFolder:
    """What a folder says of its model beside the transformer. `transformer`: its place in the folder, "" for the folder
    itself. `longest`: the most tokens of a text, if they are limited here. `lower`: whether texts are lowercased."""

    folder: Path
    role: str
    transformer: str
    pooling: str
    layers: tuple[Layer, ...]
    prompts: Mapping[str, str]
    usual: str
    """The prompt of texts that are neither queries nor documents."""
    similarity: str
    longest: int | None
    lower: bool

    @property
    def query(self) -> str:
        """The prompt of queries."""
        return self.prompts.get("query", self.usual)

    @property
    def document(self) -> str:
        """The prompt of documents."""
        return next((self.prompts[name] for name in DOCUMENTS if name in self.prompts), self.usual)

    @property
    def files(self) -> dict[str, Path]:
        """All files that `save` writes and the list of the modules, by name."""
        names = [LIST, SETTINGS, *(f"{layer.path}/{file}" for layer in self.layers for file in (CONFIG, WEIGHTS))]
        names += [f"{self._pooling_path}/{CONFIG}"]
        found = {name: self.folder / name for name in names if (self.folder / name).is_file()}
        return found | {path.name: path for path in sorted((self.folder / self.transformer).glob(READER))}

    def save(self, checkpoint: Path) -> None:
        """Copies everything but the transformer, which is in the checkpoint's own folder, to a checkpoint."""
        for name, path in self.files.items():
            if name != LIST:
                (checkpoint / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, checkpoint / name)
        modules = json.loads((self.folder / LIST).read_text(encoding="utf-8"))
        for module in modules:
            module["path"] = "" if _kind(module) == TRANSFORMER else module["path"]
        (checkpoint / LIST).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")

    @property
    def _pooling_path(self) -> str:
        return next(module["path"] for module in _modules(self.folder, self.role) if _kind(module) == POOLING)


def is_sentence_folder(path: Path) -> bool:
    """Whether sentence-transformers wrote a folder."""
    return (path / LIST).is_file()


def transformer_folder(path: Path, role: str) -> Path:
    """The folder of the transformer: inside of a folder of sentence-transformers, or the path itself."""
    if not is_sentence_folder(path):
        return path
    kinds = {_kind(module): module for module in _modules(path, role)}
    return path / kinds[TRANSFORMER]["path"] if TRANSFORMER in kinds else path


def read_sentence_folder(folder: Path, role: str) -> SentenceFolder:
    """Reads a folder of sentence-transformers. ModelError if it is damaged, or has modules that epmq does not take."""
    modules = _modules(folder, role)
    kinds = [_kind(module) for module in modules]
    if kinds[:2] != [TRANSFORMER, POOLING] or not {*kinds[2:]} <= {DENSE, NORMALIZE}:
        raise ModelError(
            f"{role}: {folder / LIST} lists {', '.join(kinds) or 'no modules'}; epmq takes a Transformer, a Pooling "
            "and then Dense and Normalize layers"
        )
    transformer, pooling, *rest = (module["path"] for module in modules)
    reader = next(iter(sorted((folder / transformer).glob(READER))), None)
    inputs = {} if reader is None else read_json(reader.parent, reader.name, role)
    settings = read_json(folder, SETTINGS, role) if (folder / SETTINGS).is_file() else {}
    prompts = {name: text or "" for name, text in (settings.get("prompts") or {}).items()}
    found = SentenceFolder(
        folder,
        role,
        transformer,
        _pooling(folder / pooling, role),
        tuple(_layer(folder, kind, path, role) for kind, path in zip(kinds[2:], rest, strict=True)),
        prompts,
        str(prompts.get(settings.get("default_prompt_name") or "", "")),
        str(settings.get("similarity_fn_name") or SIMILARITIES[0]),
        _longest(inputs.get("max_seq_length"), reader, role),
        bool(inputs.get("do_lower_case")),
    )
    _check(found, settings)
    return found


def _check(found: SentenceFolder, settings: Mapping[str, Any]) -> None:
    """Raises ModelError for values that no model has, and for links out of the folder."""
    where = found.folder / SETTINGS
    if not all(isinstance(text, str) for text in found.prompts.values()):
        raise ModelError(f"{found.role}: {where} has prompts that are not texts; fetch the model again")
    if (name := settings.get("default_prompt_name")) is not None and name not in found.prompts:
        raise ModelError(f"{found.role}: {where} has no prompt {literal(name)}, its default_prompt_name; add it")
    if found.similarity not in SIMILARITIES:
        raise ModelError(
            f"{found.role}: {where} has the similarity_fn_name {literal(found.similarity)}; it must be one of "
            f"{', '.join(SIMILARITIES)}"
        )
    for path in found.files.values():
        if leaves(path, found.folder):
            raise ModelError(f"{found.role}: {path} is a link out of its folder; replace the link with the file")


def _modules(folder: Path, role: str) -> list[dict[str, str]]:
    """The entries of modules.json, with paths inside of the folder."""
    try:
        modules = json.loads((folder / LIST).read_text(encoding="utf-8"))
        listed = [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelError(
            f"{role}: {folder / LIST} is not a list of modules with type and path ({error}); fetch the model again"
        ) from error
    outside = next((module["path"] for module in listed if escapes(module["path"])), None)
    if outside is not None:
        raise ModelError(f"{role}: {folder / LIST} names {outside}, outside its folder; fetch the model again")
    return listed


def _kind(module: Mapping[str, str]) -> str:
    """The class of a module, which other versions of sentence-transformers have elsewhere."""
    return module["type"].rpartition(".")[2] if module["type"].startswith("sentence_transformers.") else module["type"]


def _pooling(path: Path, role: str) -> str:
    """The kind of pooling."""
    settings = read_json(path, CONFIG, role)
    chosen = settings.get("pooling_mode") or [kind for name, kind in POOLINGS.items() if settings.get(name)] or "mean"
    kinds = [chosen] if isinstance(chosen, str) else chosen
    if len(kinds) != 1 or kinds[0] not in POOLINGS.values():
        raise ModelError(
            f"{role}: {path / CONFIG} has the pooling {literal(chosen)}; epmq takes one of "
            f"{', '.join(POOLINGS.values())}"
        )
    if settings.get("include_prompt") is False:
        raise ModelError(
            f"{role}: {path / CONFIG} leaves prompts out of the pooling (include_prompt), which epmq lacks"
        )
    return str(kinds[0])


def _layer(folder: Path, kind: str, path: str, role: str) -> Layer:
    """A layer behind the pooling; Normalize needs no settings."""
    if kind == NORMALIZE:
        return Layer(kind, path, {})
    settings = read_json(folder / path, CONFIG, role)
    names = {settings.get(f"module_{part}_name", "sentence_embedding") for part in ("input", "output")}
    if settings.get("use_residual") or names != {"sentence_embedding"}:
        raise ModelError(
            f"{role}: {folder / path / CONFIG} describes a Dense layer with a residual or another input than the "
            "sentence embedding, which epmq does not take"
        )
    if not (folder / path / WEIGHTS).is_file():
        raise ModelError(
            f"{role}: {folder / path} has no {WEIGHTS}; load the model with sentence-transformers and save it again"
        )
    return Layer(kind, path, settings)


def _longest(value: Any, reader: Path | None, role: str) -> int | None:
    if value is None or (isinstance(value, int) and 0 < value <= LONGEST):
        return value
    raise ModelError(f"{role}: {reader} has the max_seq_length {literal(value)}, which must be a number of tokens")


def differences(one: SentenceFolder, other: SentenceFolder) -> Iterator[str]:
    """The differences of two folders that change embeddings, as phrases with the values of both. Whether embeddings are
    normalized does not count, because similarities are."""
    if one.pooling != other.pooling:
        yield f"pools by {one.pooling}, and {other.role} by {other.pooling}"
    dense = [[layer for layer in folder.layers if layer.kind == DENSE] for folder in (one, other)]
    if [layer.settings for layer in dense[0]] != [layer.settings for layer in dense[1]]:
        yield f"has other Dense layers than {other.role}"
    for mine, others in zip(*dense, strict=False):
        if not _same_weights(one.folder / mine.path / WEIGHTS, other.folder / others.path / WEIGHTS):
            yield (
                f"has trained its Dense layer ({mine.path}), which differs from that of {other.role}, and epmq merges "
                "the transformer only"
            )


def _same_weights(one: Path, other: Path) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
