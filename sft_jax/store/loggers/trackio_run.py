"""Trackio: a database on this machine, which ``trackio show`` draws; or a Space that ``TRACKIO_SPACE_ID`` names."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import Context
from pathlib import Path
from typing import Any

from sft_jax.store.loggers.identities import known_as, remember
from sft_jax.store.loggers.logger import LoggedRun, Logger


class Trackio(Logger):
    """Logs to a run of Trackio; a resumed run continues it.

    Trackio finds runs by their name, so a name that is taken in the project gets an ending of its own.
    """

    def __init__(self, run: LoggedRun, project: str):
        import trackio  # type: ignore[import-not-found]

        self._trackio = trackio
        name = known_as(run, "trackio", project)
        is_known = name is not None
        if name is None:
            name = f"{run.name}-{uuid.uuid4().hex[:6]}" if run.name in _names(project) else run.name
        with redirect_stdout(sys.stderr):  # programs read the standard output
            self._run = Context().run(  # apart from a run of the user's, and from the one that ends with the process
                trackio.init,
                project=project,
                name=name,
                config=dict(run.config),
                resume="allow" if is_known else "never",
                embed=False,
                auto_log_gpu=False,  # these are threads with packages of their own
                auto_log_cpu=False,
            )
        remember(run, "trackio", project, name)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of a step."""
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log generated answers as a table."""
        columns = ["prompt", "text", "finish_reason"]
        table = self._trackio.Table(columns=columns, data=[[row[key] for key in columns] for row in rows])
        self._run.log({"samples": table}, step=step)

    def figure(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file as an image."""
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self, failed: bool = False) -> None:
        """Wait until the rows are in the database."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


def _names(project: str) -> set[str]:
    """The names of the runs of a project."""
    import trackio  # type: ignore[import-not-found]

    try:
        return {one.name for one in trackio.Api().runs(project)}
    except ValueError:  # there is no such project yet
        return set()
