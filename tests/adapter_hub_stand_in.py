"""A hub on 127.0.0.1 that models can be pushed to and fetched from: the part of its HTTP interface that a push uses.

Written after the requests that huggingface_hub 2.4 sends (hf_api.py, _commit_api.py, lfs.py).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "right" * 7


@dataclass
class Repository:
    """One repository: its visibility, and the files of each branch and commit."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    large: set[str] = field(default_factory=set)
    """Paths that are held as LFS objects."""

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add the files to the branch and return the commit's name."""
        self.branches[branch] = self.branches[branch] | files
        name = hashlib.sha1(repr(sorted(self.branches[branch].items())).encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = self.branches[branch]
        self.heads[branch] = name
        return name

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or commit."""
        return self.branches.get(revision, self.commits.get(revision))


@dataclass
class Hub:
    """What the stand-in holds, what it was asked, and what it is told to do wrong."""

    endpoint: str
    owners: set[str] = field(default_factory=lambda: {"me"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Regular expression over `METHOD /path` → the status and words that are answered instead."""
    ignored: set[str] = field(default_factory=set)
    """Paths that a .gitignore of the repository leaves out."""
    damaged: set[str] = field(default_factory=set)
    """Paths of which something else is kept than was sent."""
    yaml_warnings: list[str] = field(default_factory=list)

    def forget(self) -> None:
        """Be as new."""
        for kept in (self.repositories, self.asked, self.tokens, self.objects, self.answers, self.ignored, self.damaged,
                     self.yaml_warnings):  # fmt: skip
            kept.clear()


@contextmanager
def adapter_hub() -> Iterator[Hub]:
    """Give a hub at `hub.endpoint` (for HF_ENDPOINT) as long as the block lasts."""

    class Bound(_Answers):
        hub: Hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    Bound.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield Bound.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if not path.startswith("/lfs/"):
            self.hub.tokens.append(token)
        told = next(
            (say for asked, say in self.hub.answers.items() if re.fullmatch(asked, f"{self.command} {path}")), None
        )
        if told is not None:
            self._give(told[0], {"error": told[1]})
        elif path.startswith("/lfs/"):
            self._store(path, body)
        elif token != TOKEN:
            self._give(401, {"error": "Invalid username or password."})
        else:
            self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._of_model("/".join(parts[2:4]), parts[4:], body)
        else:
            self._download("/".join(parts[:2]), parts[2:])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.hub.owners:
            return self._give(403, {"error": "You don't have the rights to create a model under this namespace"})
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self._give(409, {"error": "You already created this model repo"} | url)
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self._give(200, url)

    def _validate(self, content: str) -> None:
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if head is None:
            return self._give(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        return self._give(200, {"errors": [], "warnings": [{"message": text} for text in self.hub.yaml_warnings]})

    def _batch(self, asked: dict[str, Any]) -> None:
        assert asked["operation"] == "upload"
        objects = [
            {"oid": item["oid"], "size": item["size"], "actions": {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}}
            for item in asked["objects"]
        ]  # fmt: skip
        self._give(200, {"transfer": "basic", "objects": objects})

    def _store(self, path: str, body: bytes) -> None:
        if path == "/lfs/verify":
            asked = json.loads(body)
            held = self.hub.objects.get(asked["oid"], b"")
            return self._give(200 if len(held) == asked["size"] else 404, {})
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._give(400, {"error": "other bytes than promised"})
        self.hub.objects[oid] = body
        return self._give(200, {})

    def _of_model(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        verb, revision = (rest[0], "/".join(rest[1:])) if rest else ("", "main")
        if repository is None:
            self._give(404, {"error": "Repository not found"}, code="RepoNotFound")
        elif verb == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            self._give(409 if known else 200, {})
        elif repository.at(revision) is None:
            self._give(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        elif verb == "preupload":
            self._preupload(json.loads(body)["files"])
        elif verb == "commit":
            self._commit(name, repository, revision, body)
        else:
            self._show(name, repository, verb, revision, parse_qs(body.decode()).get("paths"))

    def _show(self, name: str, repository: Repository, verb: str, revision: str, paths: list[str] | None) -> None:
        files = repository.at(revision) or {}
        if verb in ("tree", "paths-info"):
            wanted = [path for path in files if paths is None or path in paths]
            return self._give(200, [self._entry(repository, path, files[path]) for path in wanted])
        assert verb in ("", "revision"), verb
        sha = repository.heads.get(revision, revision)
        return self._give(200, {"id": name, "private": repository.private, "sha": sha})

    def _preupload(self, files: list[dict[str, Any]]) -> None:
        self._give(200, {"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": file["path"] in self.hub.ignored, "oid": None}
            for file in files
        ]})  # fmt: skip

    def _commit(self, model: str, repository: Repository, branch: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            else:
                assert item["key"] == "header", f"a push only adds files, not {item['key']}"
        files |= {path: files[path] + b" " for path in self.hub.damaged & set(files)}
        name = repository.commit(branch, files)
        self._give(200, {"commitUrl": f"{self.hub.endpoint}/{model}/commit/{name}", "commitOid": name})

    def _entry(self, repository: Repository, path: str, content: bytes) -> dict[str, Any]:
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)} | (
            {"lfs": large} if path in repository.large else {}
        )

    def _download(self, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        files = repository.at(rest[1]) if repository and rest[:1] == ["resolve"] else None
        path = "/".join(rest[2:])
        if repository is None or files is None or path not in files:
            return self._give(404, {"error": "Entry not found"}, code="EntryNotFound")
        commit = repository.heads.get(rest[1], rest[1])
        return self._send(200, files[path], {"ETag": f'"{git_blob_id(files[path])}"', "X-Repo-Commit": commit})

    def _give(self, status: int, answer: object, *, code: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if status >= 400 and isinstance(answer, dict) and str(answer.get("error", "\n")).isprintable():
            headers["X-Error-Message"] = str(answer["error"])
        self._send(status, json.dumps(answer).encode(), headers | {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def git_blob_id(content: bytes) -> str:
    """Return what `git hash-object` says of the content."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content, usedforsecurity=False).hexdigest()
