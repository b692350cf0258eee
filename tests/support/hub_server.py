"""A server that speaks the protocol of the Hugging Face Hub, on this machine, for a few models."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories in memory.

    Attributes:
        repos: name -> revision -> path -> content; every revision is a branch and a commit.
        gated: names whose files need a login.
        requests: "METHOD path" of all requests, in their order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.address = ""

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        """Adds the files below a folder as a repository."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repos.setdefault(repo, {"main": {}})[revision] = files

    def commit(self, repo: str, revision: str) -> str:
        """The commit of a revision."""
        content = self.repos[repo][revision]
        described = repr(sorted((k, hashlib.sha256(v).hexdigest()) for k, v in content.items()))
        return hashlib.sha1(described.encode()).hexdigest()

    def find(self, repo: str, revision: str) -> str | None:
        """The branch that a branch's name or a commit means."""
        for branch in self.repos[repo]:
            if revision in (branch, self.commit(repo, branch)):
                return branch
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kept = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(content)), **kept}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _parts(self) -> list[str]:
        path = urllib.parse.urlparse(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        return [urllib.parse.unquote(part) for part in path.strip("/").split("/")]

    def _place(self, repo: str, revision: str, *, files: bool) -> str | None:
        """The branch that a request means; None after an answer that there is none."""
        if repo not in self.hub.repos:
            self._refuse(401, "RepoNotFound")
            return None
        if files and repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return None
        branch = self.hub.find(repo, revision)
        if branch is None:
            self._refuse(404, "RevisionNotFound")
        return branch

    def do_GET(self) -> None:
        match self._parts():
            case ["api", "models", owner, name, *rest] if rest[:1] in ([], ["revision"]):
                repo, revision = f"{owner}/{name}", rest[1] if rest else "main"
                if (branch := self._place(repo, revision, files=False)) is not None:
                    names = [{"rfilename": path} for path in self.hub.repos[repo][branch]]
                    sha = self.hub.commit(repo, branch)
                    self._answer(200, {"id": repo, "sha": sha, "siblings": names})
            case ["api", "models", owner, name, "tree", revision, *_]:
                repo = f"{owner}/{name}"
                if (branch := self._place(repo, revision, files=False)) is not None:
                    files = self.hub.repos[repo][branch]
                    rows = [
                        {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                        for path, content in files.items()
                    ]
                    self._answer(200, rows)
            case [owner, name, "resolve", revision, *path]:
                repo = f"{owner}/{name}"
                if (branch := self._place(repo, revision, files=True)) is not None:
                    self._file(repo, branch, "/".join(path))
            case _:
                self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def _file(self, repo: str, branch: str, path: str) -> None:
        content = self.hub.repos[repo][branch].get(path)
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        etag = hashlib.sha256(content).hexdigest()
        commit = self.hub.commit(repo, branch)
        self._answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body, parts = self._body(), self._parts()
        if self.headers.get("Authorization") != "Bearer hf_writer":
            self._refuse(401, "Unauthorized")
            return
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
                exists = repo in self.hub.repos
                self.hub.repos.setdefault(repo, {"main": {}})
                self._answer(409 if exists else 200, {"url": f"{self.hub.address}/{repo}"})
            case ["api", "models", owner, name, "branch", branch]:
                self.hub.repos[f"{owner}/{name}"].setdefault(branch, {})
                self._answer(200, {})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": file["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular"}
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                self._answer(200, {"files": files})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**asked, "authenticated": True,
                     "actions": {"upload": {"href": f"{self.hub.address}/put/{asked['oid']}"}}}
                    for asked in json.loads(body)["objects"]
                ]  # fmt: skip
                self._answer(200, {"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision, body)
            case _:
                self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        content, parts = self._body(), self._parts()
        assert parts == ["put", hashlib.sha256(content).hexdigest()]
        self.hub.uploads[parts[1]] = content
        self._answer(200)

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        files = dict(self.hub.repos[repo][revision])
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo][revision] = files
        sha = self.hub.commit(repo, revision)
        url = f"{self.hub.address}/{repo}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url})


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a server on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(patch: pytest.MonkeyPatch, address: str, cache: Path, offline: bool = False) -> None:
    """Makes huggingface_hub of this process ask a server, with a cache of its own."""
    from huggingface_hub import constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", offline), ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True),
    ):  # fmt: skip
        patch.setattr(constants, name, value)
