"""What is answered while the base loads: that the process lives, and that it is not ready; then the server takes over."""

import socket
import threading
import time
from typing import Any

import uvicorn

from lora_tune.serving.api import settings_of_uvicorn
from lora_tune.serving.bodies import dump, error_body
from lora_tune.serving.guard import ApiSettings, Guard, Receive, Scope, Send

_RETRY_AFTER = (b"retry-after", b"5")


class LoadingServer:
    """Answers on a socket that listens, in a thread of its own, until it is stopped; the socket goes on listening."""

    def __init__(self, listening: socket.socket, settings: ApiSettings) -> None:
        self._socket = listening.dup()
        self._server = uvicorn.Server(
            uvicorn.Config(Guard(_loading, settings), **settings_of_uvicorn(), lifespan="off")
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="loading", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End its connections; who connects from now on waits for the server."""
        # Told to end before it began, uvicorn would leave its socket with the event loop.
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.005)
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


async def _loading(scope: Scope, _receive: Receive, send: Send) -> None:
    status, body, headers = _answer(scope["path"])
    start = {"type": "http.response.start", "status": status}
    await send(start | {"headers": [(b"content-type", b"application/json"), *headers]})
    await send({"type": "http.response.body", "body": dump(body)})


def _answer(path: str) -> tuple[int, dict[str, Any], tuple[tuple[bytes, bytes], ...]]:
    if path == "/health":
        return 200, {"status": "ok"}, ()
    if path == "/ready":
        return 503, {"status": "not ready"}, (_RETRY_AFTER,)
    words, hint = "the server is loading its base and its adapters", "wait until GET /ready answers 200"
    return 503, error_body(503, words, code="loading", hint=hint), (_RETRY_AFTER,)
