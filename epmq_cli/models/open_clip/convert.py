"""Converts an open_clip model into a folder that transformers loads as a CLIPModel, once, in a cache."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epmq_cli.errors import CheckpointError, ModelError, first_line
from epmq_cli.models.model_folder import SafetensorsFiles, Tensors, check_counts, read_json
from epmq_cli.models.open_clip.config import clip_config
from epmq_cli.models.open_clip.preprocess import image_processor, tokenizer
from epmq_cli.models.open_clip.tensors import Translated
from epmq_cli.models.state_dict import open_file
from epmq_cli.store.atomic import sync
from epmq_cli.store.cache import cache_folder
from epmq_cli.store.manifest import file_problems, write_manifest
from epmq_cli.store.weight_files import SINGLE

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PICKLE = "open_clip_pytorch_model.bin"
VERSION = b"1"  # of the conversion: a new version converts again
SHOWN = 3


def converted(path: Path, role: str) -> Path:
    """The converted folder of an open_clip folder, or of the weights file in one; ModelError as for `convert`."""
    folder, weights = (path.parent, path) if path.is_file() else (path, weights_file(path, role))
    config = read_json(folder, CONFIG, role)
    return convert(config, (folder / CONFIG).read_bytes(), folder / CONFIG, weights, role)


def convert(config: Mapping[str, Any], text: bytes, where: Path | str, weights: Path, role: str) -> Path:
    """The folder of the CLIPModel that an open_clip_config.json and a file of weights describe.

    It is in `open_clip/` of $EPMQ_CACHE (default: epmq in $XDG_CACHE_HOME or ~/.cache), and its name depends on the
    contents of config (`text`) and weights alone. A corrupted folder is converted again. `where`: the source of
    the config, for errors. ModelError if CLIPModel does not support the model.
    """
    target = cache_folder() / "open_clip" / _digest(text, weights)
    if not _is_whole(target):
        clip, processor = _described(config, where, role)
        tensors = Translated(open_file(weights, role), weights, role)
        check_counts(Path(where), role, dict(config), len(tensors.infos))
        _check_complete(tensors, clip, weights, role)
        _write(target, tensors, clip, processor, role)
    return target


def _described(config: Mapping[str, Any], where: Path | str, role: str) -> tuple[Any, Any]:
    """The transformers config and image processor of an open_clip_config.json."""
    try:
        clip = clip_config(config, where, role)
        return clip, _processor(config, where, clip, role)
    except ModelError:
        raise
    except Exception as error:  # the file may hold anything
        reason = first_line(error)
        raise ModelError(f"{role}: {where} describes no model of open_clip ({reason}); fetch it again") from error


def _processor(config: Mapping[str, Any], where: Path | str, clip: Any, role: str) -> Any:
    try:
        return image_processor(config.get("preprocess_cfg") or {}, clip.vision_config.image_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the file may hold anything
        raise ModelError(
            f"{role}: preprocess_cfg in {where} describes no image processor of transformers ({first_line(error)}); "
            "family open_clip needs an image processor that resizes the shortest edge and crops, or that squashes"
        ) from error


def own_processor(path: Path, clip: Any, role: str) -> Path | None:
    """A folder with the image processor that the open_clip_config.json of an expert's folder describes, from the cache;
    None if the folder describes none. `clip`: the base's config."""
    if not path.is_dir() or not (path / CONFIG).is_file():
        return None
    config = read_json(path, CONFIG, role)
    if not config.get("preprocess_cfg"):
        return None
    name = f"{_digest((path / CONFIG).read_bytes())}-processor-{clip.vision_config.image_size}"
    target = cache_folder() / "open_clip" / name
    if not _is_whole(target):
        processor = _processor(config, path / CONFIG, clip, role)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            processor.save_pretrained(partial)
            write_manifest(partial, {})
            _put(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def weights_file(folder: Path, role: str) -> Path:
    """The safetensors file of an open_clip folder."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    hint = f"; name the file itself: {folder / PICKLE}" if (folder / PICKLE).is_file() else ""
    raise ModelError(f"{role}: {folder} has no {WEIGHTS}{hint or '; save the model with save_for_hf of open_clip'}")


def expert_tensors(path: Path, role: str) -> Tensors:
    """The translated tensors of an expert: one file, or an open_clip folder."""
    if path.is_file():
        return Translated(open_file(path, role), path, role)
    return Translated(SafetensorsFiles(weights_file(path, role), role), path, role)


def _digest(text: bytes, weights: Path | None = None) -> str:
    """A name made of the contents of a config and a file of weights."""
    digest = hashlib.blake2b(VERSION + text, digest_size=16)
    if weights is not None:
        with weights.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _check_complete(tensors: Translated, config: Any, path: Path, role: str) -> None:
    """Raises ModelError if the tensors are not those of the CLIPModel of this config."""
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    stored = {name: info.shape for name, info in tensors.infos.items()}
    wrong = [name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name)]
    if wrong:
        raise ModelError(
            f"{role}: the tensors in {path} are not those that its {CONFIG} describes: "
            f"{', '.join(sorted(wrong)[:SHOWN])} differ; fetch both again"
        )


def _is_whole(folder: Path) -> bool:
    """Whether a converted folder is complete; a power cut can leave empty files."""
    try:
        return folder.is_dir() and not file_problems(folder)
    except (CheckpointError, OSError):
        return False


def _write(target: Path, tensors: Translated, config: Any, processor: Any, role: str) -> None:
    """Writes the whole folder or nothing; ModelError if the disk is full."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            from safetensors.torch import save_file  # imports torch

            save_file({name: tensors.tensor(name) for name in tensors.infos}, partial / SINGLE, {"format": "pt"})
            config.save_pretrained(partial)
            processor.save_pretrained(partial)
            tokenizer(config.text_config.max_position_embeddings).save_pretrained(partial)
            write_manifest(partial, {})
            for path in [*partial.iterdir(), partial]:
                sync(path)
            _put(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # tokenizers raises it
            raise
        raise ModelError(
            f"{role}: the converted model cannot be written to {target} ({error}); free some space, or set EPMQ_CACHE "
            "to a folder on a larger disk"
        ) from error


def _put(partial: Path, target: Path) -> None:
    """Renames a complete folder to its name, in place of a corrupted one; another process may have been faster."""
    if _is_whole(target):
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        if not _is_whole(target):
            raise
    sync(target.parent)
