"""Watches a run directory, also one in a bucket, and one that does not exist yet."""

from __future__ import annotations

from http.server import ThreadingHTTPServer

from sft_jax.errors import UserError
from sft_jax.files.buckets import is_url
from sft_jax.report.live import live_page
from sft_jax.report.server import serve
from sft_jax.store.folder import RunDirectory
from sft_jax.store.metrics import read_metrics


def watch(name: str, port: int) -> ThreadingHTTPServer:
    """A server of the live page of a run.

    Args:
        name: the run directory.
        port: 0 for a free one.

    Raises:
        UserError: there is no such directory.
        OSError: the port is in use.
    """
    first = RunDirectory(name)
    if not (first.local / "config.yaml").is_file():
        raise UserError(f"{name}: not a run directory; it has no config.yaml")

    is_remote = is_url(name)

    def page() -> str:
        folder = RunDirectory(name)  # copies the newest metrics of a bucket
        metrics = read_metrics(folder.local / "metrics.jsonl")
        return live_page(name, folder.local, metrics, folder.holder(), is_remote)

    return serve(page, first.local / "report", port)
