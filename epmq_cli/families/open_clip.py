"""open_clip (https://github.com/mlfoundations/open_clip): plain vision transformers with CLIP's own text tower.

Base: a model by open_clip's own name (models/open_clip/registry.py), an open_clip folder, or a CLIPModel of
transformers. open_clip models are converted into a CLIPModel, and the checkpoint is a CLIPModel too. Experts: state
dicts of the whole model or of its image encoder. Their visual projection is merged as well, since fine-tuning code for
open_clip trains it.
"""

from __future__ import annotations

from pathlib import Path

from epmq_cli.families.clip import Clip
from epmq_cli.families.text_tower import PROJECTION
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.open_clip.convert import CONFIG, WEIGHTS, converted, expert_tensors


class OpenClip(Clip):
    """`family: open_clip`."""

    def open(self, path: Path, role: str, base: ModelFolder | None) -> ModelFolder:
        """The base (where `base` is None) or an expert, in the layout of CLIPModel.

        A folder that is in that layout already, such as an adapter or a CLIPModel, is read as in family clip.
        """
        if base is None:
            ready = path.is_dir() and (path / "config.json").is_file() and not (path / WEIGHTS).is_file()
            return ModelFolder(path if ready else converted(path, role), role)
        if path.is_dir() and not (path / CONFIG).is_file():
            return super().open(path, role, base)
        return ModelFolder(path, role, base.config, expert_tensors(path, role))

    def tensor_names(self, folder: ModelFolder) -> dict[str, str]:
        """The vision tower and its projection."""
        projection = {PROJECTION: PROJECTION} if PROJECTION in folder.infos else {}
        return super().tensor_names(folder) | projection
