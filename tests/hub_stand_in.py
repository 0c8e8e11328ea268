"""A hub on 127.0.0.1 that knows a few dataset repositories: enough of its HTTP interface for `snapshot_download`."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
GATED = "gated"
"""Put instead of a repository's files: who asks is refused."""

Files = dict[str, bytes]


@contextmanager
def hub_stand_in(datasets: dict[str, Files | str]) -> Iterator[tuple[str, list[str]]]:
    """Give the endpoint (for HF_ENDPOINT) and the list of what was asked of it so far.

    Args:
        datasets: repository → its files at REVISION, or GATED.
    """
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            listing = parts[:2] == ["api", "datasets"]
            name, rest = "/".join(parts[2:4] if listing else parts[1:3]), parts[4 if listing else 3 :]
            files = datasets.get(name)
            if files is None:
                self._refuse(401, "RepoNotFound")
            elif isinstance(files, str):
                self._refuse(403, "GatedRepo")
            elif rest[1:2] != [REVISION]:
                self._refuse(404, "RevisionNotFound")
            elif listing and rest[0] == "revision":
                self._give(json.dumps({"id": name, "sha": REVISION}).encode(), "json")
            elif listing:
                self._give(json.dumps([_entry(path, content) for path, content in files.items()]).encode(), "json")
            elif "/".join(rest[2:]) in files:
                self._give(files["/".join(rest[2:])], "octet-stream")
            else:
                self._refuse(404, "EntryNotFound")

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _give(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_digest(content)}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
