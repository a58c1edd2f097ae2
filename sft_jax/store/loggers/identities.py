"""``loggers.json``: the names by which services know a run, so that a resumed run continues there."""

from __future__ import annotations

import json

from sft_jax.files.flush import write_whole
from sft_jax.files.json_object import read_object
from sft_jax.store.loggers.logger import LoggedRun

_FILE = "loggers.json"


def known_as(run: LoggedRun, service: str, project: str) -> str | None:
    """The identity of a resumed run in a project of a service; None for a new run, or a project that is new to it."""
    path = run.folder / _FILE
    if not run.is_resumed or not path.is_file():
        return None
    entry = read_object(path).get(service)
    if not isinstance(entry, dict) or entry.get("project") != project or not isinstance(entry.get("id"), str):
        return None
    return entry["id"]


def remember(run: LoggedRun, service: str, project: str, identity: str) -> None:
    """Keep the identity of a run for when it resumes."""
    path = run.folder / _FILE
    entries = read_object(path) if path.is_file() else {}
    entries[service] = {"project": project, "id": identity}
    write_whole(path, json.dumps(entries, indent=1) + "\n")
