"""The serving guide: its curl bodies are taken, its Python runs, and its table names every route."""

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from lora_tune.serving.api import make_app
from tests.live_api import ADMIN, ApiSettings, live

GUIDE = (Path(__file__).resolve().parents[2] / "docs/guides/serving.md").read_text()
BLOCKS = {
    kind: re.findall(rf"```{tag}\n(.*?)```", GUIDE, re.S) for kind, tag in (("shell", "sh"), ("python", "python"))
}
CURLS = [
    line for block in BLOCKS["shell"] for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("guide")) as running:
        yield running


def test_the_curl_lines_are_answered_in_their_order(server):
    assert len(CURLS) >= 9
    for line in CURLS:
        words = shlex.split(line.replace("$ADMIN", ADMIN))
        option = {name: words[place + 1] for place, name in enumerate(words) if name in ("-X", "-d")}
        headers = dict(words[place + 1].split(": ", 1) for place, name in enumerate(words) if name == "-H")
        url = next(word for word in words if word.startswith("http")).replace("http://127.0.0.1:8000", server.url)
        method = option.get("-X", "POST" if "-d" in option else "GET")
        answer = httpx.request(method, url, headers=headers, content=option.get("-d"), timeout=20)
        assert answer.status_code in (200, 201, 204), (line, answer.text)


def test_the_python_runs(server, capsys):
    (code,) = BLOCKS["python"]
    names = {}
    exec(code.replace("http://127.0.0.1:8000", server.url), names)
    names["client"].close()
    assert "home@3" in capsys.readouterr().out


def test_the_table_names_every_route_with_its_key(server):
    named = {}
    for cells in re.findall(r"^\| (`(?:GET|POST|PUT|DELETE).*?) \| (\w+) \|", GUIDE, re.M):
        named |= {tuple(route.split()): cells[1] for route in re.findall(r"`([A-Z]+ \S+)`", cells[0])}
    policies = {"open_to_all": "none", "needs_api_key": "API", "needs_admin_key": "admin"}
    app = make_app(server.fleet, ApiSettings())
    for route in app.routes:
        if isinstance(route, APIRoute):
            (policy,) = [policies[inner.call.__name__] for inner in route.dependant.dependencies]
            for method in route.methods:
                assert named.pop((method, route.path_format)) == policy, (method, route.path)
    assert set(named) == {("GET", "/"), ("GET", "/page/…")}
    assert (
        json.dumps(sorted(route.path for route in app.routes if not isinstance(route, APIRoute))).count("/page/") >= 2
    )
