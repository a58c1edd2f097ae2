"""A local Hugging Face Hub: the part of its API with which huggingface_hub creates, writes and reads models."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from fake_gcs import _Server


@dataclass
class Repo:
    """Files by branch, each with its contents, and commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[dict] = field(default_factory=list)
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def sha(self, branch: str) -> str:
        """The commit of a branch, a digest of what it holds."""
        digests = {name: hashlib.sha1(body).hexdigest() for name, body in self.branches[branch].items()}
        sha = hashlib.sha1(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        self.revisions[sha] = dict(self.branches[branch])
        return sha

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        return self.branches.get(revision) or self.revisions.get(revision)


class Hub:
    """Repositories by name, served on a loopback port while the ``with`` block runs.

    Attributes:
        cuts: how many more requests of a kind (``preupload``, ``batch``, ``lfs``, ``commit``) are cut in the middle.
        read_only: whether the token may not write.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.cuts: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.read_only = False
        hub = self

        class Handler(_Handler):
            store = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, code: int = 200, **headers: str) -> None:
        self._answer(code, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _body(self, kind: str) -> bytes | None:
        """Read the body of a request; None if the connection is cut."""
        size = int(self.headers.get("Content-Length") or 0)
        self.store.requests[kind] += 1
        if self.store.cuts[kind] > 0:
            self.store.cuts[kind] -= 1
            self.rfile.read(size // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        return self.rfile.read(size)

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.store.token}"

    def _repo(self, name: str) -> Repo | None:
        """A repository that this request may see; answers if there is none."""
        repo = self.store.repos.get(name)
        if repo is None or (repo.private and not self._is_known):
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        return repo

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = self._repo("/".join(parts[2:4]))
            if repo is not None:
                self._describe(repo, parts)
        elif len(parts) > 4 and parts[2] == "resolve":
            repo = self._repo("/".join(parts[:2]))
            if repo is not None:
                self._download(repo, parts[3], "/".join(parts[4:]))
        else:
            self._json({"error": "not found"}, 404)

    def _describe(self, repo: Repo, parts: list[str]) -> None:
        kind, revision = (parts[4], parts[5]) if len(parts) > 5 else ("revision", "main")
        files = repo.at(revision)
        if files is None:
            return self._json({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        if kind == "tree":
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in files.items()
                ]
            )
        sha = repo.sha(revision) if revision in repo.branches else revision
        siblings = [{"rfilename": name} for name in files]
        name = "/".join(parts[2:4])
        return self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def _download(self, repo: Repo, revision: str, name: str) -> None:
        files = repo.at(revision)
        if files is None or name not in files:
            return self._json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
        sha = repo.sha(revision) if revision in repo.branches else revision
        digest = hashlib.sha256(files[name]).hexdigest()
        return self._answer(200, files[name], ETag=f'"{digest}"', X_Repo_Commit=sha)

    def do_PUT(self) -> None:
        body = self._body("lfs")
        if body is None:
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        assert "Authorization" not in self.headers  # as for a signed URL of another host
        self.store.blobs[oid] = body
        self._answer(200)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        kind = parts[4] if parts[:2] == ["api", "models"] else parts[-1]
        raw = self._body(kind)
        if raw is None:
            return
        if not self._is_known:
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.store.read_only:
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if path == "/api/repos/create":
            return self._create(json.loads(raw))
        if kind == "batch":
            name = "/".join(parts[:2]).removesuffix(".git")
            if self._repo(name) is not None:
                self._batch(json.loads(raw))
            return None
        repo = self._repo("/".join(parts[2:4]))
        if repo is None:
            return None
        if kind == "branch":
            if parts[5] in repo.branches:
                return self._json({"error": "Reference already exists"}, 409)
            repo.branches[parts[5]] = dict(repo.branches["main"])
            return self._json({})
        if kind == "preupload":
            return self._preupload(repo.branches[parts[5]], json.loads(raw))
        assert kind == "commit", path
        return self._commit("/".join(parts[2:4]), repo, parts[5], [json.loads(line) for line in raw.splitlines()])

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.store.repos:
            return self._json({"error": "You already created this model repo"}, 409)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.store.repos[name] = Repo(private)
        return self._json({"url": f"{self.store.url}/{name}", "id": name})

    def _preupload(self, files: dict[str, bytes], asked: dict) -> None:
        """Weights are stored apart; a file is described by its digest, so that an equal one is not sent again."""
        answers = []
        for one in asked["files"]:
            name, body = one["path"], files.get(one["path"])
            is_large = name.endswith(".safetensors")
            answer = {"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if body is not None:
                git = hashlib.sha1(f"blob {len(body)}\0".encode() + body)
                answer["oid"] = hashlib.sha256(body).hexdigest() if is_large else git.hexdigest()
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.store.blobs:
                answer["actions"] = {"upload": {"href": f"{self.store.url}/lfs/{one['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, lines: list[dict]) -> None:
        files = dict(repo.branches[branch])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.store.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line["key"]
                del files[value["path"]]
        repo.sha(branch)  # keeps the commit before
        repo.branches[branch] = files
        repo.commits.append(lines[0]["value"])
        sha = repo.sha(branch)
        self._json({"commitUrl": f"{self.store.url}/{name}/commit/{sha}", "commitOid": sha})
