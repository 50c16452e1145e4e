"""`tracking=mlflow`: runs in a store of MLflow (https://mlflow.org)."""

from __future__ import annotations

import os
from itertools import islice
from typing import ClassVar

from epmq_cli.tracking.tracker import RunRecord, Tracker

BATCH = 100
"""The most parameters, and fewer than the most metrics, that MLflow takes at a time."""


class Mlflow(Tracker):
    """`uri`: the store: a database such as sqlite:///mlflow.db, a folder, or a server. `experiment`: its name."""

    package: ClassVar[str] = "mlflow"

    def __init__(self, uri: str, experiment: str) -> None:
        super().__init__()
        self._uri, self._experiment = uri, experiment

    def record(self, run: RunRecord) -> None:
        """See Tracker."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        ended = int(1000 * run.ended)
        took = sum(value for name, value in run.metrics.items() if name.startswith("seconds/"))
        made = client.create_run(experiment, start_time=ended - int(1000 * took), run_name=run.name)
        number, params = made.info.run_id, iter(run.params.items())
        while batch := [Param(name, value) for name, value in islice(params, BATCH)]:
            client.log_batch(number, params=batch)
        metrics = iter(run.metrics.items())
        while values := [Metric(name, value, ended, 0) for name, value in islice(metrics, BATCH)]:
            client.log_batch(number, metrics=values)
        for path in run.artifacts:
            client.log_artifact(number, str(path))
        client.set_terminated(number, "FINISHED", ended)
