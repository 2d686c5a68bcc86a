"""A stand-in for a model hub: what `huggingface_hub` sends to make a repository, fill it and fetch from it.

It keeps branches in memory. What the client needs is answered, anything else is 404, and `asked` has every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_right"
LARGE = 10_000  # bytes from which a file goes to the large files


class Hub(ThreadingHTTPServer):
    """branches: {repo: {branch: {path: bytes}}}. fail: how many uploads of large files are refused from now on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fail = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's name, of what it holds."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _pointer(content: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        self.server.asked.append(f"{self.command} {path}")
        writes = self.command in ("POST", "PUT") and "/objects/" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
            return
        for pattern, answer in _ROUTES.items():
            method, _, form = pattern.partition(" ")
            match = re.fullmatch(form, path)
            if match and self.command in method.split("|"):
                answer(self, body, *match.groups())
                return
        self._answer(404, {"error": "no such thing"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def log_message(self, *_: Any) -> None:
        pass

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        new = repo not in self.server.branches
        if new:
            self.server.branches[repo] = {"main": {}}
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        self._answer(200 if new else 409, {"url": f"{self.server.address}/{repo}"})

    def validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        there = self.server.branches[repo]
        new = there.setdefault(name, dict(there["main"])) is not None
        self._answer(201 if new else 409)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        replies = [
            {"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular", "shouldIgnore": False}
            for one in files
        ]
        self._answer(200, {"files": replies})

    def batch(self, body: bytes, repo: str) -> None:
        answers = []
        for one in json.loads(body)["objects"]:
            where = {"href": f"{self.server.address}/objects/{one['oid']}", "header": {}}
            known = one["oid"] in self.server.objects
            answers.append(one | ({} if known else {"actions": {"upload": where}}))
        self._answer(200, {"transfer": "basic", "objects": answers}, Content_Type="application/vnd.git-lfs+json")

    def store(self, body: bytes, oid: str) -> None:
        if self.server.fail:
            self.server.fail -= 1
            self._answer(400, {"error": "cut"})
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.branches[repo][revision]
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = commit_of(files)
        address = f"{self.server.address}/{repo}/commit/{oid}"
        self._answer(200, {"commitOid": oid, "commitUrl": address, "pullRequestUrl": None})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.server.branches.get(repo, {}).get(revision)
        if files is None:
            self._answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return
        info = {"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": [{"rfilename": one} for one in files]}
        self._answer(200, info | {"private": self.server.private[repo], "tags": [], "downloads": 0})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision) or {}
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            | ({"lfs": _pointer(content)} if len(content) >= LARGE else {})
            for path, content in files.items()
        ]
        self._answer(200, entries)

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        there = self.server.branches.get(repo, {})
        return there.get(revision) or next((files for files in there.values() if commit_of(files) == revision), None)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        if files is None or path not in files:
            self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            return
        content = files[path]
        begin, end = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(match[1]), int(match[2] or end - 1) + 1
        self._answer(
            206 if match else 200,
            content[begin:end],
            X_Repo_Commit=commit_of(files),
            ETag=f'"{hashlib.sha256(content).hexdigest()}"',
        )


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"POST /api/models/{_REPO}/branch/(.+)": _Handler.branch,
    f"POST /api/models/{_REPO}/preupload/(.+)": _Handler.preupload,
    f"POST /{_REPO}\\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /objects/(.+)": _Handler.store,
    f"POST /api/models/{_REPO}/commit/(.+)": _Handler.commit,
    f"GET /api/models/{_REPO}/tree/([^/]+)": _Handler.tree,
    f"GET /api/models/{_REPO}/revision/(.+)": _Handler.info,
    f"GET /api/models/{_REPO}": _Handler.info,
    f"GET|HEAD /{_REPO}/resolve/([^/]+)/(.+)": _Handler.resolve,
}
