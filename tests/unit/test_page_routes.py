"""The page's files: a fixed list of routes, nothing inline, nothing from elsewhere, and text that only ever becomes text."""

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lora_tune.serving.page import page_files, page_routes

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lora_tune" / "serving" / "page"
ROUTES = {
    "/": "text/html; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
    "/page/page.js": "text/javascript; charset=utf-8",
    "/page/compare.js": "text/javascript; charset=utf-8",
    "/page/adapters.js": "text/javascript; charset=utf-8",
    "/page/server.js": "text/javascript; charset=utf-8",
    "/page/parts.js": "text/javascript; charset=utf-8",
}
SCRIPTS = sorted(FOLDER.glob("*.js"))


class Page(HTMLParser):
    """The page as a browser's parser meets it: tags with their attributes, and the labels around fields."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.fields, self.inline, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("input", "select", "textarea"):
            self.fields.append((dict(attrs), "label" in self.open))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == self.open.pop(), tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.inline.append(data)


@pytest.fixture(scope="module")
def page():
    return Page((FOLDER / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def client():
    with TestClient(Starlette(routes=page_routes())) as client:
        yield client


def test_the_routes_are_these_and_no_others():
    assert {route.path: sorted(route.methods) for route in page_routes()} == {path: ["GET", "HEAD"] for path in ROUTES}


def test_every_file_of_the_folder_is_served_and_no_other():
    served = {file.content for file in page_files()}
    assert served == {path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}


@pytest.mark.parametrize("path", ROUTES)
def test_a_file_comes_with_its_type_and_a_policy_that_lets_nothing_else_in(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == ROUTES[path]
    assert answer.headers["cache-control"] == "no-cache"
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules.pop("img-src") == "data:"
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert {rules.pop(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert {rules.pop(name) for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert rules == {}


@pytest.mark.parametrize("path", ROUTES)
def test_a_browser_that_has_the_file_is_told_so(client, path):
    first = client.get(path)
    again = client.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


def test_names_are_for_content():
    tags = [file.etag for file in page_files()]
    assert len(set(tags)) == len(tags)
    assert tags == [file.etag for file in page_files()]


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_the_page_takes_nothing(client, method):
    assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize(
    "path", ["/page/", "/page/..%2fpage.py", "/page/../page.py", "/page/index.html", "/page/page.css/", "/favicon.ico"]
)
def test_nothing_else_is_served(client, path):
    assert client.get(path, follow_redirects=False).status_code in (307, 404)
    assert b"import" not in client.get(path, follow_redirects=False).content


def test_no_script_style_or_listener_is_inline(page):
    assert page.inline == []
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag not in ("style", "iframe", "object", "embed", "base", "img")
        assert tag != "form" or not attributes.get("action")


def test_nothing_comes_from_elsewhere(page):
    wanted = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert {value for value in wanted if not value.startswith(("#", "data:image/png;base64,"))} == {
        "page/page.css",
        "page/page.js",
    }
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|url\(|@import", text), path


def test_the_scripts_import_each_other_and_nothing_else():
    for path in SCRIPTS:
        imported = re.findall(r"from \"(.+)\"", path.read_text(encoding="utf-8"))
        assert {(FOLDER / name).resolve() for name in imported} <= set(SCRIPTS), path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_only_ever_becomes_text_and_nothing_is_kept(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextual|DOMParser|eval\(|Function\(", text
    )
    assert not re.search(r"localStorage|indexedDB|document\.cookie|caches\.", text)
    assert ("sessionStorage" in text) == (path.name == "server.js")
    assert text.count("\n") <= 400


def test_every_field_and_dialog_has_a_name(page):
    labelled = {attributes["for"] for tag, attributes in page.elements if tag == "label" and "for" in attributes}
    for attributes, is_in_label in page.fields:
        assert is_in_label or attributes["id"] in labelled or attributes.get("aria-label"), attributes
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for", "list"):
            assert attributes.get(name, ids[0]) in ids, (tag, attributes)
        assert tag != "dialog" or "aria-labelledby" in attributes
        assert int(attributes.get("tabindex", "0")) <= 0


def test_every_element_that_a_script_looks_for_is_there(page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    sought = {
        name for path in SCRIPTS for name in re.findall(r"byId\(\"([\w-]+)\"\)", path.read_text(encoding="utf-8"))
    }
    assert len(sought) > 30
    assert sought <= ids


def test_the_page_is_in_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["lora_tune"]
    for path in FOLDER.iterdir():
        assert any(fnmatch(path.relative_to(ROOT / "lora_tune").as_posix(), pattern) for pattern in patterns), path.name
