"""Models by open_clip's own names.

open_clip:ViT-B-32/openai        a model of open_clip and one of its pretrained tags
open_clip:hf-hub:owner/name      a repository of the hub with an open_clip_config.json
open_clip:/path/to/folder        a folder with one; also open_clip:./folder and open_clip:local-dir:folder
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.open_clip.config import SCHEME, clip_config
from epmq_cli.models.open_clip.convert import CONFIG, PICKLE, WEIGHTS, convert
from epmq_cli.runtime.paths import escapes, expanded

HUB, FOLDER = "hf-hub:", "local-dir:"
PATH = ("/", "./", "../", "~")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SHOWN = 8  # names in an error


def locate_open_clip(source: str, role: str, root: str | None = None) -> Path:
    """The folder of a model by open_clip's own name.

    A model with a tag is converted into a folder of transformers in the cache. Weights are searched in the mirror
    `root`, then in the cache of the hub, then on the hub. ModelError if open_clip does not have the model or the tag,
    before anything is read or fetched.
    """
    name = source.removeprefix(SCHEME)
    if name.startswith((FOLDER, *PATH)):
        return _folder(expanded(name.removeprefix(FOLDER), role), source, role)
    if name.startswith(HUB):
        return _repository(name.removeprefix(HUB), source, role, root)
    model, tag = _known(name, source, role)
    config, where = _config(model, tag), f"open_clip's config of {model}"
    clip_config(config, where, role)  # refuses other architectures before their weights are fetched
    text = json.dumps(config, sort_keys=True).encode()
    return convert(config, text, where, _weights(model, tag, role, root), role)


def _folder(path: Path, source: str, role: str) -> Path:
    if not (path / CONFIG).is_file():
        raise ModelError(f"{role}: {source} must be a folder with {CONFIG}, and {path} has none")
    return path


def _repository(name: str, source: str, role: str, root: str | None) -> Path:
    """The folder of a repository: in the mirror, or in the cache of the hub with its config and safetensors."""
    if not REPOSITORY.fullmatch(name) or escapes(name):
        raise ModelError(f"{role}: {source} must be {SCHEME}{HUB}owner/name")
    if (mirror := _mirror(name, root)) is not None:
        return _folder(mirror, source, role)
    config = _fetched(name, CONFIG, role, root)
    _fetched(name, WEIGHTS, role, root)
    return config.parent


def _mirror(repository: str, root: str | None) -> Path | None:
    """The folder of a repository in a mirror; None if there is none."""
    folder = expanded(root, "suite.root") / repository if root else None
    return folder if folder is not None and folder.is_dir() else None


def _known(name: str, source: str, role: str) -> tuple[str, str]:
    """The model and the tag of a name; ModelError with close names if open_clip does not have them."""
    from open_clip import list_models, list_pretrained, list_pretrained_tags_by_model

    model, _, tag = name.rpartition("/") if "/" in name else (name, "", "")
    model, tag = model.replace("/", "-"), tag.replace("-", "_")  # open_clip writes ViT-B/32 and laion2b-e16 like that
    if model not in list_models():
        names = sorted({each for each, _ in list_pretrained()}, key=lambda each: (not each.startswith("ViT"), each))
        raise ModelError(f"{role}: open_clip has no model {model!r}, got {source}; {_close(model, names)}")
    tags = list_pretrained_tags_by_model(model)
    own_tag = {each.lower(): each for each in tags}.get(tag.lower())
    if own_tag is None:
        which = f"no pretrained weights {tag!r} of" if tag else "pretrained weights only by a tag for"
        raise ModelError(
            f"{role}: open_clip has {which} {model}, got {source}; give {SCHEME}{model}/TAG; {_close(tag, tags)}"
        )
    return model, own_tag


def _close(name: str, names: Sequence[str]) -> str:
    """The names names that are close to a name, or else the first of them, as a phrase."""
    lower = {one.lower(): one for one in names}
    close = [lower[one] for one in get_close_matches(name.lower(), lower, SHOWN, 0.6)]
    if close:
        return f"close names are {', '.join(close)}"
    more = ", ..." if len(names) > SHOWN else ""
    return f"it has {', '.join(names[:SHOWN]) or 'none'}{more} (open_clip.list_pretrained() lists all)"


def _config(model: str, tag: str) -> dict[str, Any]:
    """The open_clip_config.json that a model with a tag would have.

    The activation is the one that the weights were trained with, as in open_clip 2. open_clip 3 uses that of the model
    and warns if the two differ, as for ViT-B-32 with openai.
    """
    from open_clip import get_model_config, get_pretrained_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    trained, architecture = get_pretrained_cfg(model, tag), get_model_config(model)
    architecture["quick_gelu"] = bool(trained.get("quick_gelu", architecture.get("quick_gelu", False)))
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), trained)
    del preprocess["size"]  # that of the model
    return {"model_cfg": architecture, "preprocess_cfg": preprocess}


def _weights(model: str, tag: str, role: str, root: str | None) -> Path:
    """The file of a tag's weights: safetensors if the repository has them, else a pickle, which is read with
    weights_only=True."""
    from open_clip import get_pretrained_cfg

    place = str(get_pretrained_cfg(model, tag).get("hf_hub", ""))  # owner/name/ or owner/name/file
    repository, file = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:]) or PICKLE
    if not REPOSITORY.fullmatch(repository):
        raise ModelError(f"{role}: open_clip does not name a repository of the hub for {model}/{tag}; give a folder")
    safe = WEIGHTS if file == PICKLE else str(Path(file).with_suffix(".safetensors"))
    if (mirror := _mirror(repository, root)) is not None:
        for path in (mirror / safe, mirror / file):
            if path.is_file():
                return path
    return _fetched(repository, file, role, root, safe)


def _fetched(repository: str, file: str, role: str, root: str | None, safe: str | None = None) -> Path:
    """A file of a repository, from the cache of the hub or from the hub; open_clip prefers the file named `safe`."""
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        return Path(download_pretrained_from_hf(repository, filename=file))
    except Exception as error:  # open_clip and the hub raise unrelated errors
        first, other = safe or file, f" (or {file})" if safe not in (None, file) else ""
        places = f"in {root}/{repository}" if root else "in a mirror (data_root)"
        raise ModelError(
            f"{role}: {first} of {repository} is neither {places} nor in the cache of the hub, and the hub does not "
            f"give it ({first_line(error)}); on a machine with a network run: hf download {repository} {first}{other}"
        ) from error
