"""The one door to transformers' from_pretrained: it reads a folder's own files, and runs no code that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from epmq_cli.errors import ModelError


def from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a folder; ModelError where it cannot, or only by code of the folder's.

    Nothing is fetched. Left to itself transformers asks at the terminal whether to run such code.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config may hold anything, and transformers checks little of it
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{folder} brings code of its own (auto_map in its JSON files), which epmq never runs; give a model "
                "and a tokenizer of a kind that transformers has"
            ) from error
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{folder} cannot be read by {kind.__name__} of transformers ({reason}); give the folder that "
            "save_pretrained wrote"
        ) from error
