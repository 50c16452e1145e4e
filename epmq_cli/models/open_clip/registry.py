"""Models by open_clip's own names.

open_clip:ViT-B-32/openai        a model of open_clip and one of its pretrained tags
open_clip:hf-hub:owner/name      a repository of the hub with an open_clip_config.json
open_clip:local-dir:FOLDER       a folder with one; open_clip:/path and open_clip:./path mean the same
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from epmq_cli.checkpoint.links import escapes
from epmq_cli.errors import ModelError, first_line
from epmq_cli.models.open_clip.convert import CONFIG, PICKLE, WEIGHTS, Stored, convert
from epmq_cli.places import expanded

SCHEME = "open_clip:"
HUB, FOLDER = "hf-hub:", "local-dir:"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PATH = ("/", "./", "../", "~")
SHOWN = 8  # names in an error


@dataclass(frozen=True)
class Pretrained:
    """A model of open_clip's registry with one of its tags."""

    model: str
    tag: str

    @property
    def config(self) -> dict[str, Any]:
        """As in an open_clip_config.json.

        The activation is the one that the weights were trained with; open_clip only warns where its model has another.
        """
        from open_clip import get_model_config, get_pretrained_cfg
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        tag = get_pretrained_cfg(self.model, self.tag)
        model = get_model_config(self.model)
        model["quick_gelu"] = bool(tag.get("quick_gelu", model.get("quick_gelu", False)))
        preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), tag)
        return {"model_cfg": model, "preprocess_cfg": {name: preprocess[name] for name in preprocess if name != "size"}}

    @property
    def repository(self) -> str:
        """Where the hub has the weights, as owner/name or owner/name/file."""
        from open_clip import get_pretrained_cfg

        return str(get_pretrained_cfg(self.model, self.tag).get("hf_hub", "")).strip("/")


def locate_open_clip(source: str, role: str, root: str | None) -> Path:
    """The folder of a model that is called by one of open_clip's names.

    A model with a tag is converted into a folder of transformers in the cache. Weights are looked for in the mirror
    `root`, then in the cache of the hub, then on the hub. ModelError, before anything is read or fetched, where
    open_clip has no such name.
    """
    name = source.removeprefix(SCHEME)
    if name.startswith((FOLDER, *PATH)):
        return _folder(name.removeprefix(FOLDER), source, role)
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB), source, role, root)
    found = _pretrained(name, source, role)
    stored = Stored(found.config, f"open_clip's {found.model}/{found.tag}", lambda: _weights(found, role, root))
    return convert(stored, role)


def _folder(name: str, source: str, role: str) -> Path:
    path = expanded(name, role)
    if not (path / CONFIG).is_file():
        raise ModelError(f"{role}: {source} needs a folder with {CONFIG}, and {path} has none")
    return path


def _from_hub(repository: str, source: str, role: str, root: str | None) -> Path:
    if not REPOSITORY.fullmatch(repository) or escapes(repository):
        raise ModelError(f"{role}: {SCHEME}{HUB} takes owner/name, got {source}")
    mirror = expanded(root, "suite.root") / repository if root else None
    if mirror is not None and mirror.is_dir():
        return _folder(str(mirror), source, role)
    return _fetched(repository, CONFIG, role, root) and _fetched(repository, WEIGHTS, role, root).parent


def _pretrained(name: str, source: str, role: str) -> Pretrained:
    """The model and tag of a name; ModelError lists close names where open_clip has none such."""
    from open_clip import list_models, list_pretrained_tags_by_model

    model, _, tag = name.rpartition("/")
    model, tag = (model.replace("/", "-"), tag) if model else (tag, "")
    if model not in list_models():
        raise ModelError(
            f"{role}: open_clip has no model {model!r} for {source}; {_close(model, list_models())}, and "
            f"{SCHEME}MODEL/TAG, {SCHEME}{HUB}owner/name and {SCHEME}/path/to/folder are the forms"
        )
    tags = list_pretrained_tags_by_model(model)
    if tag.lower().replace("-", "_") not in tags:
        given = f"no pretrained weights {tag!r}" if tag else "no default weights"
        raise ModelError(f"{role}: open_clip has {given} for {model}; {_close(tag, tags)}; give {SCHEME}{model}/TAG")
    return Pretrained(model, tag)


def _close(name: str, known: Iterable[str]) -> str:
    """The known names that are like a name, or some of them, as a phrase."""
    known = list(known)
    lower = {one.lower(): one for one in known}
    found = [lower[one] for one in get_close_matches(name.lower(), lower, SHOWN, 0.6)]
    shown = found or known[:SHOWN]
    more = "" if found or len(known) <= SHOWN else " and others (open_clip.list_pretrained())"
    return f"close names are {', '.join(shown)}" if found else f"it has {', '.join(shown) or 'none'}{more}"


def _weights(model: Pretrained, role: str, root: str | None) -> Path:
    """The weights of a tag, safetensors where there are any; a pickle is read as tensors only."""
    repository, _, file = _split(model.repository)
    names = [file and str(Path(file).with_suffix(".safetensors")), file] if file else [WEIGHTS, PICKLE]
    mirror = expanded(root, "suite.root") / repository if root else None
    for name in names:
        if mirror is not None and (mirror / name).is_file():
            return mirror / name
    return _fetched(repository, file or PICKLE, role, root, f"{model.model!r}, pretrained={model.tag!r}")


def _split(repository: str) -> tuple[str, str, str]:
    owner, _, rest = repository.partition("/")
    name, separator, file = rest.partition("/")
    return f"{owner}/{name}", separator, file


def _fetched(repository: str, file: str, role: str, root: str | None, call: str = "") -> Path:
    """A file of the hub, out of open_clip's cache or fetched into it; of PICKLE its safetensors come first."""
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        return Path(download_pretrained_from_hf(repository, filename=file))
    except Exception as error:  # open_clip raises its own kinds and those of the hub
        call = call or f"'{HUB}{repository}'"
        places = f"under {root} nor in the cache of the hub" if root else "in the cache of the hub"
        raise ModelError(
            f"{role}: {repository} has {file} neither {places}, and it cannot be fetched ({first_line(error)}); where "
            f'there is a network, run python -c "import open_clip; open_clip.create_model({call})"'
        ) from error
