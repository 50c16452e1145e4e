"""Makes a folder that transformers loads as a CLIPModel of an open_clip model, once, in a cache."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from epmq_cli.errors import CheckpointError, ModelError, first_line
from epmq_cli.models.model_folder import SafetensorsFiles, Tensors, check_counts, read_json
from epmq_cli.models.open_clip.config import clip_config, image_processor, refused_preprocess, tokenizer
from epmq_cli.models.open_clip.tensors import Translated
from epmq_cli.models.state_dict import open_file
from epmq_cli.store.atomic import sync
from epmq_cli.store.cache import cache_folder
from epmq_cli.store.manifest import file_problems, write_manifest
from epmq_cli.store.safetensors_writer import SINGLE

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PICKLE = "open_clip_pytorch_model.bin"
VERSION = b"1"  # of the conversion: another one makes the folders anew
SHOWN = 3


def converted(path: Path, role: str) -> Path:
    """The converted folder of an open_clip folder, or of the weights file in one.

    It is in `open_clip/` of $EPMQ_CACHE (left out: epmq in $XDG_CACHE_HOME or ~/.cache), named after the contents of
    config and weights, and made anew where it is damaged. ModelError where CLIPModel cannot express the model.
    """
    folder, weights = (path.parent, path) if path.is_file() else (path, weights_file(path, role))
    config = read_json(folder, CONFIG, role)
    target = cache_folder() / "open_clip" / _digest([folder / CONFIG, weights])
    if not _is_whole(target):
        found, processor = _described(config, folder / CONFIG, role)
        tensors = Translated(open_file(weights, role), weights, role)
        check_counts(folder / CONFIG, role, config, len(tensors.infos))
        _check_complete(tensors, found, weights, role)
        _write(target, tensors, found, processor, role)
    return target


def _described(config: Mapping[str, Any], path: Path, role: str) -> tuple[Any, Any]:
    """Model and image processor of an open_clip_config.json, as transformers has them."""
    try:
        found = clip_config(config, path, role)
        return found, image_processor(config, found)
    except ModelError:
        raise
    except Exception as error:  # it may hold anything
        reason = first_line(error)
        raise ModelError(f"{role}: {path} describes no model of open_clip ({reason}); fetch it again") from error


def own_processor(path: Path, clip: Any, role: str) -> Path | None:
    """A folder with the image processor that the open_clip_config.json of an expert's folder describes, made once in
    the cache; None where there is none. `clip`: the base's config."""
    if not path.is_dir() or not (path / CONFIG).is_file():
        return None
    config = read_json(path, CONFIG, role)
    if not config.get("preprocess_cfg"):
        return None
    side = clip.vision_config.image_size
    target = cache_folder() / "open_clip" / f"{_digest([path / CONFIG])}-processor-{side}"
    if not _is_whole(target):
        try:
            if refused := refused_preprocess(config["preprocess_cfg"]):
                raise ValueError(refused)
            found = image_processor(config, clip)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # it may hold anything
            raise ModelError(
                f"{role}: preprocess_cfg in {path / CONFIG} describes no image processor of transformers ({error}); "
                "fetch it again"
            ) from error
        try:
            found.save_pretrained(partial)
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


def _digest(files: Iterable[Path]) -> str:
    """A name made of the contents."""
    digest = hashlib.blake2b(VERSION, digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _check_complete(tensors: Translated, config: Any, path: Path, role: str) -> None:
    """Refuses tensors that are not those of the CLIPModel of this config."""
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    found = {name: info.shape for name, info in tensors.infos.items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise ModelError(
            f"{role}: the tensors in {path} are not those that its {CONFIG} describes: "
            f"{', '.join(sorted(wrong)[:SHOWN])} differ; fetch both again"
        )


def _is_whole(folder: Path) -> bool:
    """Whether a converted folder is there with all that was written; not where a power cut left empty files."""
    try:
        return folder.is_dir() and not file_problems(folder)
    except (CheckpointError, OSError):
        return False


def _write(target: Path, tensors: Translated, config: Any, processor: Any, role: str) -> None:
    """Writes the folder whole or not at all; ModelError where the disk does not take it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            save_file({name: tensors.tensor(name) for name in tensors.infos}, partial / SINGLE, {"format": "pt"})
            config.save_pretrained(partial)
            processor.save_pretrained(partial)
            tokenizer(config).save_pretrained(partial)
            write_manifest(partial, {})
            for path in [*partial.iterdir(), partial]:
                sync(path)
            _put(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # as tokenizers raises
            raise
        raise ModelError(
            f"{role}: the converted model cannot be written to {target} ({error}); free some space, or set EPMQ_CACHE "
            "to a folder that has some"
        ) from error


def _put(partial: Path, target: Path) -> None:
    """Gives a folder that is on disk its name, in place of a damaged one; another process may have been faster."""
    if _is_whole(target):
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        if not _is_whole(target):
            raise
    sync(target.parent)
