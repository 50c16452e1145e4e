"""Setup of a process that Ray starts for jobs of a sweep (conf/hydra/launcher/ray_cluster.yaml)."""

from __future__ import annotations

import os

FOLDER = "EPMQ_FOLDER"


def enter() -> None:
    """Changes to the folder in which the sweep started, as Slurm does, so relative paths mean the same."""
    os.chdir(os.environ[FOLDER])
