"""Who may ask what: keys, hosts, origins, sizes and times, before anything of a request is believed; one log line for each."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from lora_tune.serving.bodies import dump, error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("lora_tune.serving")
BODY_SECONDS = 30.0
"""Longest time that a request's body may take to come in."""
_USUAL_HEADERS = "authorization, content-type, x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(\s*,\s*[A-Za-z0-9-]{1,64}){0,63}")
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset=\"?utf-8\"?\s*)?", re.IGNORECASE)


@dataclass(frozen=True)
class ApiSettings:
    """Who may ask, and how much."""

    api_keys: tuple[str, ...] = ()
    """Any of them opens the API; empty asks for none."""
    admin_keys: tuple[str, ...] = ()
    """Any of them opens everything; empty turns the admin routes off."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """What a request's Host header may say, with a port or for every port; `*` for anything."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages elsewhere that may ask, `https://example.org`; the server's own pages always may."""
    max_body_bytes: int = 1024 * 1024
    max_waiting: int = 256
    """Requests whose prompts are prepared at once; more are told to come back."""
    page: bool = True
    """Serve the page at `/`."""


class HttpRefusal(Exception):  # noqa: N818 - it refuses; nothing has gone wrong
    """What is refused before the request means anything."""

    def __init__(self, status: int, message: str, *, code: str, hint: str = "", headers: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, code=code, hint=hint)
        self.headers = tuple(header.split(": ", 1) for header in headers)


def open_to_all() -> None:
    """Policy: no key."""


def needs_api_key(request: Request) -> None:
    """Policy: an API key or an admin key, where the server has API keys."""
    settings: ApiSettings = request.app.state.settings
    if settings.api_keys and not _holds(_bearer(request), (*settings.api_keys, *settings.admin_keys)):
        raise _unauthorized("this server asks for an API key")


def needs_admin_key(request: Request) -> None:
    """Policy: an admin key; a server without one has no admin routes."""
    settings: ApiSettings = request.app.state.settings
    if not settings.admin_keys:
        raise HttpRefusal(
            403, "the admin routes are off", code="admin_off", hint="start the server with --admin-key-file"
        )
    given = _bearer(request)
    if _holds(given, settings.admin_keys):
        return
    if _holds(given, settings.api_keys):
        raise HttpRefusal(403, "this is no admin key", code="not_an_admin_key", hint="send an admin key")
    raise _unauthorized("this route asks for an admin key")


POLICIES: tuple[Callable[..., None], ...] = (open_to_all, needs_api_key, needs_admin_key)


def check_policies(routes: Iterable[BaseRoute], open_pages: Iterable[BaseRoute] = ()) -> None:
    """Check that every route says who may ask it, so that none is open by oversight.

    Args:
        routes: all routes of the app.
        open_pages: static files that are open to all.
    """
    known = list(open_pages)
    for route in routes:
        if any(route is page for page in known):
            continue
        called = [inner.call for inner in route.dependant.dependencies] if isinstance(route, APIRoute) else []
        if sum(call in POLICIES for call in called) != 1:
            raise AssertionError(f"{getattr(route, 'path', route)} does not say who may ask it")


def _unauthorized(message: str) -> HttpRefusal:
    return HttpRefusal(
        401, message, code="invalid_api_key", hint="send it as `Authorization: Bearer KEY`",
        headers=["www-authenticate: Bearer"],
    )  # fmt: skip


def _bearer(request: Request) -> str | None:
    given = request.headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _holds(given: str | None, keys: tuple[str, ...]) -> bool:
    """Whether it is one of the keys, in a time that says nothing of them."""
    # Headers are read as Latin-1: this gives back the bytes that were sent.
    digest = hashlib.sha256((given or "").encode("latin-1")).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    return found and given is not None


class Guard:
    """Around the whole app: Host, Origin, content type, size and time of the body; request id, log, and the last catch."""

    def __init__(self, app: App, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        reply = _Reply(send, _request_id(headers))
        scope.setdefault("state", {})["request_id"] = reply.request_id
        started = time.monotonic()
        try:
            await self._guarded(scope, headers, receive, reply)
        except HttpRefusal as refusal:
            await reply.refuse(refusal)
        except Exception as err:  # noqa: BLE001 - the door: a bug answers 500, is logged, and the server goes on
            log_event("error", id=reply.request_id, **_without_words(err))
            await reply.refuse(HttpRefusal(500, "this is a bug of the server", code="internal_error"))
        finally:
            route = getattr(scope.get("route"), "path", "none")
            log_event(
                "request", id=reply.request_id, method=scope["method"], route=route, status=reply.status,
                seconds=round(time.monotonic() - started, 4),
            )  # fmt: skip

    async def _guarded(self, scope: Scope, headers: list[tuple[str, str]], receive: Receive, reply: "_Reply") -> None:
        host = _check_host(headers, self._settings.allowed_hosts)
        origin = _check_origin(headers, host, self._settings.allowed_origins)
        if origin is not None:
            reply.headers += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
            if scope["method"] == "OPTIONS":
                await reply.preflight(_values(headers, "access-control-request-headers"))
                return
        _check_said(headers, self._settings.max_body_bytes)
        body = _Body(receive, headers, self._settings.max_body_bytes)
        await self._app(scope, body.receive, reply.send)


class _Reply:
    """What is sent back: every answer carries the request's id, and one that has begun is not begun again."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0
        self.headers = [(b"x-request-id", request_id.encode("ascii")), (b"x-content-type-options", b"nosniff")]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self.headers]
        await self._send(message)

    async def refuse(self, refusal: HttpRefusal) -> None:
        if self.status:
            # Half an answer: ending the connection is all that is left to say.
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        headers = [("content-type", "application/json"), *refusal.headers]
        await self._begin(refusal.status, [(name.encode(), value.encode()) for name, value in headers])
        await self._send({"type": "http.response.body", "body": dump(refusal.body)})

    async def preflight(self, asked: list[str]) -> None:
        # A listed page may send what its client likes to send along (`x-stainless-…`): the key is what opens.
        named = asked[0] if len(asked) == 1 and _HEADER_NAMES.fullmatch(asked[0]) else _USUAL_HEADERS
        allowed = [
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", named.encode("ascii")),
            (b"access-control-max-age", b"600"),
        ]
        await self._begin(204, allowed)
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})


def log_event(event: str, **facts: object) -> None:
    """Write one line of JSON; control characters are escaped, and no caller puts prompts or keys in."""
    LOG.info(json.dumps({"at": round(time.time(), 3), "event": event, **facts}))


def _without_words(err: BaseException) -> dict[str, object]:
    """Return what an exception is and where it rose, without its message: that could quote a prompt."""
    frames = traceback.extract_tb(err.__traceback__)[-6:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    return {"kind": type(err).__name__, "at_lines": places}


def _values(headers: list[tuple[str, str]], name: str) -> list[str]:
    return [value for found, value in headers if found == name]


def _request_id(headers: list[tuple[str, str]]) -> str:
    given = _values(headers, "x-request-id")
    return given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex


def _check_host(headers: list[tuple[str, str]], allowed: tuple[str, ...]) -> str:
    """Return the Host; a page elsewhere whose name was pointed to this machine says its own name there."""
    hosts = _values(headers, "host")
    host = hosts[0].lower() if len(hosts) == 1 else ""
    bare = re.sub(r":\d{1,5}$", "", host)
    if host and ("*" in allowed or {host, bare} & {name.lower() for name in allowed}):
        return host
    raise HttpRefusal(
        400, "the Host header names another server", code="unknown_host",
        hint="start the server with --allow-host for each name that it is asked by",
    )  # fmt: skip


def _check_origin(headers: list[tuple[str, str]], host: str, allowed: tuple[str, ...]) -> str | None:
    """Return the Origin if it is a listed one elsewhere; None without any, or for the server's own page."""
    origins = _values(headers, "origin")
    if not origins:
        return None
    origin = origins[0].lower()
    if len(origins) == 1 and origin in {listed.lower().rstrip("/") for listed in allowed}:
        return origins[0]
    try:
        parts = urlsplit(origin)
    except ValueError:
        parts = urlsplit("")
    if len(origins) == 1 and parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{host}":
        return None
    raise HttpRefusal(
        403, "requests from this web page are not taken", code="foreign_origin",
        hint="start the server with --allow-origin for pages that may ask it",
    )  # fmt: skip


def _check_said(headers: list[tuple[str, str]], most: int) -> None:
    """Check what the headers say of a body, before any of it is read."""
    said = _values(headers, "content-length")
    if said and (not said[0].isdigit() or int(said[0][:19]) > most):
        raise _too_long(most)
    if said and said[0].strip("0"):
        _check_kind(headers)


def _check_kind(headers: list[tuple[str, str]]) -> None:
    kinds, encodings = _values(headers, "content-type"), _values(headers, "content-encoding")
    plain = all(encoding.lower() == "identity" for encoding in encodings)
    if len(kinds) != 1 or not _JSON_TYPE.fullmatch(kinds[0]) or not plain:
        raise HttpRefusal(
            415, "the body is not said to be plain JSON", code="not_json", hint="send content-type: application/json"
        )


def _too_long(most: int) -> HttpRefusal:
    return HttpRefusal(413, f"the body has more than {most} bytes", code="body_too_long", hint="send less")


class _Body:
    """A request's body, read within its limits of size and time when the app first asks for it.

    The app looks at the key first: of who has none, nothing is read or kept.
    """

    def __init__(self, receive: Receive, headers: list[tuple[str, str]], most: int) -> None:
        self._receive, self._headers, self._most = receive, headers, most
        self._is_read = False

    async def receive(self) -> Message:
        """Give the whole body, then what comes after it: the end of the connection."""
        if self._is_read:
            return await self._receive()
        self._is_read = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._whole()
        except TimeoutError:
            raise HttpRefusal(408, f"the body took longer than {BODY_SECONDS:g} s", code="body_too_slow") from None
        if body:
            _check_kind(self._headers)
        return {"type": "http.request", "body": body, "more_body": False}

    async def _whole(self) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise HttpRefusal(400, "the connection ended within the body", code="cut_off")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                raise _too_long(self._most)
        return bytes(body)
