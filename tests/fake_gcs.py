"""A local bucket: the part of the JSON API of Google Cloud Storage that gcsfs and tensorstore use."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Faults:
    """How often a bucket misbehaves.

    Attributes:
        errors: fraction of requests that are answered with 503 or 429.
        cuts: fraction of requests whose connection is closed before they are answered, or in the middle.
        delay: seconds that a request takes at most.
        stale: seconds for which a listing may lack new objects and have removed ones.
    """

    errors: float = 0.0
    cuts: float = 0.0
    delay: float = 0.0
    stale: float = 0.0


class Bucket:
    """Objects by name, served on a loopback port while the ``with`` block runs."""

    def __init__(self, faults: Faults | None = None, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.random = random.Random(seed)
        self.injected: Counter[str] = Counter()
        self.listed: tuple[float, dict[str, tuple[bytes, int]]] = (0.0, {})
        self.objects: dict[str, tuple[bytes, int]] = {}  # contents and generation
        self.lock = threading.Lock()
        self.generation = 1
        self.requests: list[str] = []
        bucket = self

        class Handler(_Handler):
            store = bucket

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Bucket:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Environment variables that point both clients to this bucket, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS": json.dumps({"token": "anon", "endpoint_url": self.url}),
            "FSSPEC_GS": json.dumps({"token": "anon", "endpoint_url": self.url}),
            "GCE_METADATA_ROOT": self.url.removeprefix("http://"),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would query the bucket type over another protocol
            "GOOGLE_CLOUD_PROJECT": "none",
        }


class _Server(ThreadingHTTPServer):
    """Ignores clients that close their connection during a request."""

    request_queue_size = 128  # simultaneous new connections

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Bucket

    def log_message(self, *_: object) -> None:
        pass

    def parse_request(self) -> bool:
        """Reads a request's head, and lets the bucket misbehave."""
        if not super().parse_request():
            return False
        faults, draw = self.store.faults, self.store.random.random
        time.sleep(faults.delay * draw())
        if draw() < faults.cuts:
            self.store.injected["cut"] += 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            return False
        if draw() < faults.errors:
            self.store.injected["error"] += 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._json({"error": {"code": 503, "message": "try again"}}, 503 if draw() < 0.8 else 429)
            return False
        return True

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, code: int = 200) -> None:
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _describe(self, name: str) -> dict[str, object]:
        body, generation = self.store.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(body)),
            "generation": str(generation), "metageneration": "1", "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z", "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(body).digest()).decode(), "etag": str(generation),
        }  # fmt: skip

    def _parts(self) -> tuple[str, dict[str, str]]:
        split = urlsplit(self.path)
        self.store.requests.append(f"{self.command} {self.path}")
        return split.path, {key: values[-1] for key, values in parse_qs(split.query).items()}

    def do_GET(self) -> None:
        path, query = self._parts()
        path = path.removeprefix("/download")
        _, _, rest = path.partition("/b/bucket")
        if "/b/bucket" not in path:
            return self._json({}, 404)
        if rest in ("", "/"):
            return self._json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
        if rest in ("/o", "/o/"):
            return self._list(query)
        name = unquote(rest.removeprefix("/o/"))
        with self.store.lock:
            if name not in self.store.objects:
                return self._json({"error": {"code": 404, "message": "not found"}}, 404)
            body, generation = self.store.objects[name]
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._answer(304)
            if query.get("alt") != "media":
                return self._json(self._describe(name))
        headers = {"x-goog-generation": str(generation), "ETag": str(generation)}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._answer(200, body, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = (
            (int(first), int(last) + 1 if last else len(body)) if first else (len(body) - int(last), len(body))
        )
        if start >= len(body):
            return self._answer(416, b"", headers)
        part = body[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
        return self._answer(206, part, headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.store.lock:
            since, objects = self.store.listed
            if time.monotonic() - since > self.store.faults.stale:
                objects = dict(self.store.objects)
                self.store.listed = (time.monotonic(), objects)
            for name in sorted(objects):
                if name not in self.store.objects:
                    continue
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self._describe(name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def do_POST(self) -> None:
        path, query = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/copyTo/" in path or "/rewriteTo/" in path:
            before, _, after = path.partition("/copyTo/" if "/copyTo/" in path else "/rewriteTo/")
            source, to = unquote(before.partition("/o/")[2]), unquote(after.partition("/o/")[2])
            with self.store.lock:
                self._put(to, self.store.objects[source][0])
                described = self._describe(to)
            return self._json({"done": True, "resource": described} if "/rewriteTo/" in path else described)
        name = query.get("name")
        if query.get("uploadType") == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
            parts = body.split(b"--" + boundary)
            name = json.loads(parts[1].split(b"\r\n\r\n" if b"\r\n\r\n" in parts[1] else b"\n\n", 1)[1])["name"]
            body = parts[2].split(b"\r\n\r\n" if b"\r\n\r\n" in parts[2] else b"\n\n", 1)[1]
            body = body.removesuffix(b"\n").removesuffix(b"\r")
        elif query.get("uploadType") == "resumable":
            name = name or json.loads(body)["name"]
            return self._answer(200, b"", {"Location": f"{self.store.url}/upload/resume?name={name}"})
        if name is None:
            return self._json({"name": "bucket"})
        return self._upload(unquote(name), body, query)

    def do_PUT(self) -> None:
        _, query = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._upload(query["name"], body, query)

    def _upload(self, name: str, body: bytes, query: dict[str, str]) -> None:
        with self.store.lock:
            _, generation = self.store.objects.get(name, (b"", 0))
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._json({"error": {"code": 412, "message": "generation"}}, 412)
            self._put(name, body)
            described = self._describe(name)
        return self._json(described)

    def _put(self, name: str, body: bytes) -> None:
        self.store.generation += 1
        self.store.objects[name] = (body, self.store.generation)

    def do_DELETE(self) -> None:
        path, _ = self._parts()
        name = unquote(path.partition("/o/")[2])
        with self.store.lock:
            removed = self.store.objects.pop(name, None)
        self._answer(204 if removed else 404)
