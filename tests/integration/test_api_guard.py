"""Who is let in: keys on every route, hosts, origins, sizes, slow clients; and what the log says of it."""

import ast
import json
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from lora_tune.serving import api, guard
from lora_tune.serving.api import ApiSettings, make_app
from lora_tune.serving.guard import check_policies
from tests.live_api import live

KEY, ADMIN = "api-key-é-1", "admin-key-1"
SETTINGS = ApiSettings(
    api_keys=(KEY, "another"), admin_keys=(ADMIN,), allowed_hosts=("127.0.0.1", "model.example"),
    allowed_origins=("https://page.example",), max_body_bytes=64 * 1024,
)  # fmt: skip
CHAT = {"model": "home", "messages": [{"role": "user", "content": "open the door"}], "max_tokens": 2}
PATHS = {"{model}": "home", "{id}": "home@1", "{alias}": "prod"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("guard"), SETTINGS) as running:
        yield running


def api_routes(server):
    routes = [route for route in make_app(server.fleet, SETTINGS).routes if isinstance(route, APIRoute)]
    assert len(routes) >= 17
    for route in routes:
        path = route.path_format
        for name, value in PATHS.items():
            path = path.replace(name, value)
        for method in route.methods:
            yield method, path


def status(server, key, method, path, **more):
    given = {"authorization": f"Bearer {key}".encode()} if key else {}
    if not server.clients:
        server.clients.append(server.http(None))
    return server.clients[0].request(method, path, headers=given | more.pop("headers", {}), **more).status_code


def test_every_route_but_health_refuses_without_its_key(server):
    for method, path in api_routes(server):
        for key in (None, "wrong", KEY[:-1], KEY + " x", "é"):
            expected = {200} if path == "/health" else {401}
            assert status(server, key, method, path) in expected, (method, path, key)
        # Neither a body that is wrong nor one that is right says more.
        if method == "POST":
            assert status(server, None, method, path, json={}) == 401
            assert status(server, None, method, path, content=b"{", headers={"content-type": "application/json"}) == 401


def test_an_api_key_is_no_admin_key_and_an_admin_key_opens_all(server):
    for method, path in api_routes(server):
        is_admin = "adapter" in path or "aliases" in path
        if is_admin:
            assert status(server, KEY, method, path) == 403, (method, path)
        elif path not in ("/v1/chat/completions", "/v1/completions"):
            assert status(server, KEY, method, path) == status(server, ADMIN, method, path) == 200, (method, path)
    assert status(server, "another", "POST", "/v1/chat/completions", json=CHAT) == 200
    assert status(server, ADMIN, "POST", "/v1/chat/completions", json=CHAT) == 200
    assert status(server, ADMIN, "GET", "/v1/adapters") == 200


def test_without_an_admin_key_the_admin_routes_are_off(tmp_path):
    with live(tmp_path, ApiSettings()) as server:
        for method, path in api_routes(server):
            if "adapter" in path or "aliases" in path:
                for key in (None, "", "x"):
                    assert status(server, key, method, path) == 403
        assert status(server, None, "POST", "/v1/chat/completions", json=CHAT) == 200


def test_two_authorizations_are_none(server):
    with server.http(None) as client:
        headers = [("authorization", f"Bearer {ADMIN}"), ("authorization", f"Bearer {ADMIN}")]
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_a_route_without_a_policy_does_not_start():
    app = FastAPI(openapi_url=None)
    check_policies(app.routes)

    @app.get("/forgotten")
    def forgotten() -> None: ...

    with pytest.raises(AssertionError, match="/forgotten"):
        check_policies(app.routes)
    included = FastAPI(openapi_url=None)
    router = APIRouter()
    router.get("/inside")(forgotten)
    included.include_router(router)
    with pytest.raises(AssertionError):
        check_policies(included.routes)
    with pytest.raises(AssertionError):
        check_policies(FastAPI().routes)  # FastAPI's own pages say nothing either


def test_keys_are_never_compared_as_text():
    tree = ast.parse(Path(guard.__file__).read_text())
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    names = {name.id for node in compared for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert not names & {"key", "keys", "digest"}
    assert (
        len([node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "compare_digest"]) == 1
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "model.example", "MODEL.example:443", "evil.example", "127.0.0.1.evil.example", "", "x/?", "localhost@evil", "model.example:x"])  # fmt: skip
@pytest.mark.parametrize("origin", [None, "same", "https://page.example", "https://evil.example", "null"])
def test_hosts_and_origins(server, host, origin):
    given = {"host": host, "authorization": f"Bearer {ADMIN}"}
    if origin is not None:
        given["origin"] = f"http://{host}" if origin == "same" else origin
    known = host.lower() in ("127.0.0.1", "127.0.0.1:9", "model.example", "model.example:443")
    expected = 400 if not known else 403 if origin in ("https://evil.example", "null") else 200
    with server.http(None) as client:
        if origin == "same":
            given["origin"] = given["origin"].lower()
        found = client.get("/v1/models", headers=given)
        assert found.status_code == expected
        allowed = found.headers.get("access-control-allow-origin")
        assert allowed == (origin if known and origin == "https://page.example" else None)


def test_a_browser_may_ask_first_from_a_listed_page_only(server):
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with server.http(None) as client:
        answered = client.options("/v1/chat/completions", headers=ask | {"origin": "https://page.example"})
        assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (204, "https://page.example")
        assert "access-control-allow-credentials" not in answered.headers
        assert answered.headers["access-control-allow-headers"] == "authorization"
        for named, allowed in (
            ("authorization, content-type, x-stainless-lang,x-stainless-os", True),
            ("a b", False),
            ("x-\xe9", False),
            (", ".join(["x" * 60] * 65), False),
        ):
            given = ask | {"origin": "https://page.example", "access-control-request-headers": named.encode("latin-1")}
            found = client.options("/v1/chat/completions", headers=given).headers["access-control-allow-headers"]
            assert found == (named if allowed else "authorization, content-type, x-request-id")
        assert (
            client.options("/v1/chat/completions", headers=ask | {"origin": "https://evil.example"}).status_code == 403
        )


def test_bodies_are_json_and_bounded(server):
    asked = json.dumps(CHAT).encode()
    with server.http("another") as client:

        def post(content, **headers):
            return client.post("/v1/chat/completions", content=content, headers=headers).status_code

        json_type = {"content-type": "application/json"}
        assert post(asked, **json_type) == 200
        assert post(asked, **{"content-type": "application/json; charset=utf-8"}) == 200
        assert post(asked) == 415
        assert post(asked, **{"content-type": "text/plain"}) == 415
        assert post(asked, **json_type, **{"content-encoding": "gzip"}) == 415
        assert post(b"x" * 65_537, **json_type) == 413
        assert post((b"x" * 1024 for _ in range(65)), **json_type) == 413
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b'{"model":NaN}',
            b"[" * 60_000,
            b'{"a":' * 10_000,
            b'"\\ud800"',
            b"1" * 60_000,
        ):
            assert post(content, **json_type) == 400, content[:20]


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 60000\r\n"
)


def test_without_a_key_no_body_is_read(server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 60.0)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    for key, found in ((b"", b" 401 "), (b"Authorization: Bearer wrong\r\n", b" 401 ")):
        for head in (HEAD, HEAD.replace(b"Content-Length: 60000", b"Transfer-Encoding: chunked")):
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(head + key + b"\r\n")
                assert found in connection.recv(4096)
    # With its key a body is waited for.
    with socket.create_connection(address, timeout=0.3) as connection:
        connection.sendall(HEAD + b"Authorization: Bearer another\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(4096)


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "HEADER_SECONDS", 0.5)
    with live(tmp_path, SETTINGS) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(HEAD + b"\r\n")
            assert b" 401 " in connection.recv(4096)
            with pytest.raises(OSError):
                for _ in range(200):
                    connection.sendall(b" ")
                    time.sleep(0.02)
        # A body that comes to its end in time costs the connection nothing.
        with server.http(None) as client:
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=CHAT).status_code == 401


def test_half_a_request_is_closed_and_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    with live(tmp_path) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        half = [socket.create_connection(address) for _ in range(100)]
        for number, connection in enumerate(half):
            connection.sendall((b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: 127.0")[number % 3])
        body = socket.create_connection(address)
        body.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        with server.http() as client:
            assert client.get("/health").status_code == 200
        for connection in half:
            connection.settimeout(10)
            assert connection.recv(100) == b""  # closed by the server
            connection.close()
        body.settimeout(10)
        assert b" 408 " in body.recv(100)
        body.close()


def test_the_event_loop_is_free_while_long_prompts_are_read(server):
    """Big bodies from many clients, and /health still answers: prompts are prepared in threads."""
    long = {"model": "home", "prompt": "light " * 5_000, "max_tokens": 2}
    stop = threading.Event()

    def press():
        with server.http(ADMIN) as client:
            while not stop.is_set():
                assert client.post("/v1/completions", json=long).status_code == 400

    threads = [threading.Thread(target=press) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with server.http(None) as client:
            assert all(client.get("/health").status_code == 200 for _ in range(20))
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def test_the_log_is_one_line_an_event_without_words_or_keys(server, caplog):
    secret, hostile = "the-secret-words", 'x\n{"event":"forged"}\x1b[31m'
    caplog.set_level(logging.INFO, logger="lora_tune.serving")
    words = [{"role": "user", "content": secret}]
    with server.http(ADMIN) as client:
        client.post(
            "/v1/chat/completions", json=CHAT | {"messages": words, "user": hostile}, headers={"x-request-id": "mine-1"}
        )
        client.post("/v1/chat/completions", json=CHAT | {"messages": words, "model": hostile})
        client.get(f"/{secret}%0a%1b", headers={"x-request-id": "a b"})
        client.delete("/v1/adapters/" + secret)
        client.post("/v1/adapters", json={"source": hostile})
        assert client.get("/health", headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"
        assert client.get("/health", headers={"x-request-id": "no\tspaces"}).headers["x-request-id"] != "no\tspaces"
    time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "lora_tune.serving"]
    assert len(lines) >= 8
    for line in lines:
        assert "\n" not in line
        assert "\x1b" not in line
        assert secret not in line
        assert ADMIN not in line
        assert json.loads(line)["event"] in ("request", "answer")
    assert any(json.loads(line).get("id") == "mine-1" for line in lines)


def test_a_bug_answers_500_says_nothing_of_itself_and_the_server_goes_on(server, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lora_tune.serving")

    def broken(*_given, **_named):
        raise KeyError("the secret words of a prompt")

    monkeypatch.setattr(server.fleet, "lease", broken)
    with server.http(ADMIN) as client:
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        monkeypatch.undo()
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    errors = [json.loads(record.getMessage()) for record in caplog.records if '"error"' in record.getMessage()]
    assert errors[0]["kind"] == "KeyError"
    assert "secret" not in json.dumps(errors)
