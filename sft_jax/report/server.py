"""Serves the live page of a run to browsers of this machine."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_FILES = {"report.html": "text/html; charset=utf-8", "loss.png": "image/png"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"
_HOST = "127.0.0.1"


def serve(page: Callable[[], str], report: Path, port: int) -> ThreadingHTTPServer:
    """Bind a server to the loopback interface; call its ``serve_forever``.

    It answers GET of ``/`` with the page, and of the files of the report, and nothing else.

    Args:
        page: renders the page.
        report: the folder ``report`` of the run.
        port: 0 for a free one.

    Raises:
        OSError: the port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = urlsplit(self.path).path.removeprefix("/")
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in (_HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)  # a page of another site that calls this machine by its own name
            elif name == "":
                self._answer(page().encode(), "text/html; charset=utf-8")
            elif name in _FILES and (report / name).is_file():
                self._answer((report / name).read_bytes(), _FILES[name])
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not printed."""

    return ThreadingHTTPServer((_HOST, port), Handler)
