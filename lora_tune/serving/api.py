"""The server: routes, guard and error bodies put together as one app, and uvicorn around it."""

import asyncio
import html
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_tune.errors import CannotCreateError, LoraTuneError, RequestError
from lora_tune.serving import admin, routes
from lora_tune.serving.answers import Serving, log_failure, told_outside
from lora_tune.serving.bodies import BODIES, error_body
from lora_tune.serving.guard import (
    POLICIES,
    ApiSettings,
    Guard,
    HttpRefusal,
    check_policies,
    log_event,
    needs_api_key,
    open_to_all,
)
from lora_tune.serving.metrics import CONTENT_TYPE, Metrics
from lora_tune.serving.page import page_routes
from lora_tune.serving.routes import serving_of
from lora_tune.serving.swap import Fleet

__all__ = ["ApiSettings", "DrainingServer", "listen", "make_app", "make_server"]

HEADER_SECONDS = 10.0
"""Longest time that a request's headers may take to come in."""
MAX_CONNECTIONS = 1024
_KEEP_ALIVE_SECONDS = 15
_RETRY_SECONDS = {429: "1", 503: "5"}
_ERROR = {"description": "An error, as OpenAI's clients read it.", "content": {"application/json": {"schema": {
    "type": "object", "required": ["error"], "properties": {"error": {"type": "object",
    "required": ["message", "type", "code", "param", "hint"]}}}}}}  # fmt: skip

_open = APIRouter(dependencies=[Depends(open_to_all)], tags=["server"])
_told = APIRouter(dependencies=[Depends(needs_api_key)], tags=["server"])


def make_app(fleet: Fleet, settings: ApiSettings) -> FastAPI:
    """Return the app of one fleet; its opener closes the fleet's engine after it.

    Raises:
        AssertionError: a route does not say who may ask it.
    """
    serving = Serving(fleet, Metrics(fleet), settings.max_waiting)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.close()

    app = FastAPI(title="lora-tune", version="1", lifespan=life, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.serving, app.state.settings = serving, settings
    for router in (_open, _told, routes.router, admin.router):
        app.router.routes.extend(router.routes)
    pages = page_routes() if settings.page else []
    app.router.routes.extend(pages)
    check_policies(app.routes, pages)
    app.router.redirect_slashes = False
    app.add_exception_handler(LoraTuneError, _own_error)
    app.add_exception_handler(HttpRefusal, _refusal)
    app.add_exception_handler(HTTPException, _plain_error)
    app.add_middleware(Guard, settings=settings)
    return app


@_open.get("/health")
async def health() -> JSONResponse:
    """Say that the process is alive; open also where keys are asked for."""
    return JSONResponse({"status": "ok"})


@_told.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Say whether requests are taken: everything is loaded, the engine answers, and the server is not shutting down."""
    is_ready = serving_of(request).fleet.ready()
    status = {"status": "ready" if is_ready else "not ready"}
    return JSONResponse(
        status, status_code=200 if is_ready else 503, headers=None if is_ready else {"retry-after": "5"}
    )


@_told.get("/metrics")
async def metrics(request: Request) -> Response:
    """Give the figures that Prometheus reads."""
    serving = serving_of(request)
    text = await serving.beside(serving.metrics.text, pool=serving.looks)
    return Response(text, headers={"content-type": CONTENT_TYPE})


@_told.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """Describe every route."""
    return JSONResponse(describe(request.app))


@_told.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """List every route on a plain page."""
    rows = []
    for path, methods in describe(request.app)["paths"].items():
        for method, facts in methods.items():
            words = [method.upper(), path, facts["x-policy"], facts.get("description", "")]
            rows.append("<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + "</tr>")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>lora-tune: routes</title><h1>Routes</h1>"
        "<p>Bodies are described in <a href=openapi.json>openapi.json</a>.</p>"
        f"<table><tr><th>Method<th>Path<th>Key<th>What it does</tr>{''.join(rows)}</table></html>"
    )
    return HTMLResponse(page, headers={"content-security-policy": "default-src 'none'"})


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with who may ask each route and every body."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi

        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=template)
        described.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        names = dict(zip(POLICIES, ("open", "api", "admin"), strict=True))
        for route in app.routes:
            if not isinstance(route, APIRoute):
                continue
            policy = next(names[inner.call] for inner in route.dependant.dependencies if inner.call in names)
            for method in route.methods or ():
                facts = described["paths"][route.path_format][method.lower()]
                facts["x-policy"] = policy
                facts["responses"].pop("422", None)
                facts["responses"]["default"] = _ERROR
        app.openapi_schema = described
    return app.openapi_schema


async def _own_error(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, LoraTuneError)
    outside = told_outside(err)
    if outside is not err:
        log_failure(request.state.request_id, err)
        err = outside
    status = err.http_status
    param = err.where if isinstance(err, RequestError | routes.UnknownModelError) and err.where else None
    body = error_body(status, err.message, code=err.code, param=param, hint=err.hint)
    retry = _RETRY_SECONDS.get(status)
    return JSONResponse(body, status_code=status, headers={"retry-after": retry} if retry else None)


async def _refusal(_request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, HttpRefusal)
    return JSONResponse(err.body, status_code=err.status, headers=dict(err.headers))


async def _plain_error(_request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, HTTPException)
    words = {404: ("there is no such route", "no_such_route"), 405: ("this route takes other methods", "wrong_method")}
    message, code = words.get(err.status_code, (str(err.detail), "refused"))
    body = error_body(err.status_code, message, code=code, hint="GET /docs lists every route")
    return JSONResponse(body, status_code=err.status_code, headers=dict(err.headers or {}))


class TimedH11(H11Protocol):
    """uvicorn's h11 protocol that closes connections whose headers do not come.

    Source: uvicorn 0.54 has no such limit; half a header stays open for as long as the client likes.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait on from the first byte of a request; its headers end the wait."""
        super().data_received(data)
        # A body that goes on after its answer was refused is thrown away, but not for ever.
        is_late = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if is_late or self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the wait."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class DrainingServer(uvicorn.Server):
    """uvicorn that answers on after the first signal, with 503 for what is new, until everything begun has ended."""

    def __init__(self, config: uvicorn.Config, fleet: Fleet, drain_seconds: float) -> None:
        super().__init__(config)
        self._fleet = fleet
        self._drain_seconds = drain_seconds
        self._draining: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain at the first signal; stop at once at the second."""
        if self._draining is None:
            self.drain()
        else:
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Begin to drain; the server stops when that is done."""
        self._draining = threading.Thread(target=self._drain, name="drain", daemon=True)
        self._draining.start()

    def _drain(self) -> None:
        log_event("drain", seconds=self._drain_seconds)
        try:
            self._fleet.drain(self._drain_seconds)
        finally:
            self.should_exit = True


def make_server(app: FastAPI, *, drain_seconds: float) -> DrainingServer:
    """Return the server of an app; `run(sockets=[…])` serves until it is stopped."""
    config = uvicorn.Config(app, lifespan="on", **settings_of_uvicorn())
    return DrainingServer(config, app.state.serving.fleet, drain_seconds)


def settings_of_uvicorn() -> dict[str, Any]:
    """Return how uvicorn serves: bounded in connections, headers and time, and silent about itself."""
    return {
        "http": TimedH11, "ws": "none", "loop": "asyncio", "log_config": None, "access_log": False,
        "server_header": False, "date_header": False, "limit_concurrency": MAX_CONNECTIONS, "proxy_headers": False,
        "timeout_keep_alive": _KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 2,
        "h11_max_incomplete_event_size": 32 * 1024,
    }  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        CannotCreateError: another program does, or the address is not this machine's (exit 73).
    """
    taken = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(512)
    except (OSError, UnicodeError) as err:
        if taken is not None:
            taken.close()
        raise CannotCreateError(
            f"{host}:{port} cannot be listened on: {getattr(err, 'strerror', None) or err}",
            hint="choose another --port or --host",
        ) from err
    return taken
