"""`tracking=wandb`: runs of Weights & Biases (https://wandb.ai), offline; `wandb sync` uploads them."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from epmq_cli.tracking.tracker import RunRecord, Tracker


class Wandb(Tracker):
    """`project`: its name. `folder`: holds the folder wandb/. `mode`: offline, or online."""

    package: ClassVar[str] = "wandb"

    def __init__(self, project: str, folder: str, mode: Literal["offline", "online"]) -> None:
        super().__init__()
        self._project, self._folder, self._mode = project, folder, mode

    def record(self, run: RunRecord) -> None:
        """See Tracker."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True)
        made = wandb.init(
            project=self._project,
            name=run.name,
            dir=self._folder,
            mode=self._mode,
            config=run.params,
            settings=settings,
        )
        made.log(run.metrics)
        for path in run.artifacts:
            artifact = wandb.Artifact(path.stem, "report")
            artifact.add_file(str(path))
            made.log_artifact(artifact)
        made.finish()
