"""open_clip (https://github.com/mlfoundations/open_clip): plain vision transformers beside CLIP's own text tower.

Base: an open_clip folder. It is converted into a CLIPModel of transformers, and the experts' tensors on being read;
from there on it is family clip, and the checkpoint is a CLIPModel too. Experts: state dicts of the whole model or of
its image encoder, whose projection is merged as well: fine-tuning code for open_clip trains it.
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

        What is in that layout already, as an adapter or beside open_clip's config, is read as in family clip.
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
