"""What a process that Ray starts for jobs of a sweep does first (conf/hydra/launcher/ray_cluster.yaml)."""

from __future__ import annotations

import os

FOLDER = "EPMQ_FOLDER"


def enter() -> None:
    """Goes to the folder in which the sweep was started, as jobs of Slurm do: relative paths then mean the same."""
    os.chdir(os.environ[FOLDER])
