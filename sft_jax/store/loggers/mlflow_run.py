"""MLflow: the server of ``MLFLOW_TRACKING_URI``, or else the folder ``mlruns`` where the command runs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from sft_jax.store.loggers.identities import known_as, remember
from sft_jax.store.loggers.logger import LoggedRun, Logger
from sft_jax.tree import flatten

# Limits of MLflow: its servers refuse more.
_LONGEST_KEY = 250  # characters
_LONGEST_VALUE = 500  # characters; newer servers take 6,000
_MOST_PARAMS = 100  # in a request


class Mlflow(Logger):
    """Logs to a run of MLflow; a resumed run continues it."""

    def __init__(self, run: LoggedRun, experiment: str):
        from mlflow.entities import Metric, Param  # type: ignore[import-not-found]
        from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

        self._metric, self._param = Metric, Param
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (Path.cwd() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse folders without it
        self._client = MlflowClient(tracking_uri=uri)
        identity = known_as(run, "mlflow", experiment)
        self._is_resumed = identity is not None
        if identity is None:
            found = self._client.get_experiment_by_name(experiment)
            number = self._client.create_experiment(experiment) if found is None else found.experiment_id
            identity = self._client.create_run(number, run_name=run.name).info.run_id
            remember(run, "mlflow", experiment, identity)
        else:
            self._client.update_run(identity, status="RUNNING")
        self._run = identity

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Log the config as a file, and as params, which cannot be changed later; long ones are shortened there."""
        self._client.log_text(self._run, json.dumps(config, indent=2, ensure_ascii=False), "config.json")
        if self._is_resumed:
            return
        params = [self._param(key_of(".".join(path)), value_of(value)) for path, value in flatten(dict(config)).items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MOST_PARAMS])

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step in one request."""
        now = int(time.time() * 1000)
        metrics = [self._metric(key_of(tag), float(value), now, step) for tag, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add generated answers to the table ``samples.json``."""
        columns = {key: [row[key] for row in rows] for key in ("prompt", "text", "finish_reason")}
        self._client.log_table(self._run, {"step": [step] * len(rows), **columns}, "samples.json")

    def figure(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file as an artifact."""
        self._client.log_artifact(self._run, str(path), "report")

    def close(self, failed: bool = False) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def key_of(name: str) -> str:
    """Returns a key that MLflow takes: other characters become their code, and a long name keeps its end.

    >>> key_of("source/é.jsonl/loss")
    'source/_e9_.jsonl/loss'
    """
    key = re.sub(r"[^\w\-. :/]", lambda found: f"_{ord(found[0]):x}_", name, flags=re.ASCII)
    key = re.sub("/{2,}", "/", key)
    if len(key) <= _LONGEST_KEY:
        return key
    digest = sha256(key.encode()).hexdigest()[:8]
    group = key.partition("/")[0][:32]
    return f"{group}/{digest}{key[-(_LONGEST_KEY - len(group) - 9) :]}"


def value_of(value: Any) -> str:
    """Returns a value that MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return text
    end = f"… ({len(text)} characters)"
    return text[: _LONGEST_VALUE - len(end)] + end
