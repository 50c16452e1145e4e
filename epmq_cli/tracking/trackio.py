"""`tracking=trackio`: runs in the local database of trackio (https://github.com/gradio-app/trackio)."""

from __future__ import annotations

import contextlib
import io
from typing import ClassVar

from epmq_cli.tracking.tracker import RunRecord, Tracker


class Trackio(Tracker):
    """`project`: its name. The database is in TRACKIO_DIR, by default in the cache of Hugging Face."""

    package: ClassVar[str] = "trackio"

    def __init__(self, project: str) -> None:
        super().__init__()
        self._project = project

    def record(self, run: RunRecord) -> None:
        """See Tracker."""
        with contextlib.redirect_stdout(io.StringIO()):  # its advice
            import trackio

            quiet = {"auto_log_gpu": False, "auto_log_cpu": False}
            trackio.init(project=self._project, name=run.name, config=run.params, resume="never", **quiet)
            trackio.log(run.metrics)
            for path in run.artifacts:
                trackio.log_artifact(str(path), name=path.stem, type="report")
            trackio.finish()
