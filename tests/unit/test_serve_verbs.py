"""What `serve` is asked for, and what of it is done at a start and at a start again."""

import importlib.util
import shutil
import threading
from pathlib import Path

import httpx
import pytest

from lora_tune.adapter import registry
from lora_tune.cli import serve_verbs
from lora_tune.cli.app import run
from lora_tune.cli.serve_verbs import ServeWish, find_wanted, load_wanted, open_server
from lora_tune.errors import MissingInputError, UsageError
from lora_tune.serving import api
from tests.fleets import adapter, bare_base, fill_registry, opened


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Return a base, and a registry with home@1 to home@3 and other@1; tests only read it."""
    folder = tmp_path_factory.mktemp("stock")
    fill_registry(folder / "registry", folder / "work", {"home": 3, "other": 1})
    return bare_base(folder / "base"), folder / "registry"


@pytest.fixture
def shelf(stock, tmp_path):
    """A copy of the registry that may be changed."""
    return Path(shutil.copytree(stock[1], tmp_path / "registry"))


def wish(root, what=None, *adapters, base=None, follow=(), **more):
    plain = {"quantization": None, "engine": "auto", "vllm_urls": (), "host": "127.0.0.1", "port": 0, "api_key_file": None,
             "admin_key_file": None, "allow_hosts": (), "allow_origins": (), "max_context": None, "max_running": 1,
             "max_adapters": 4, "max_rank": 8, "name": None, "state": None, "page": True}  # fmt: skip
    return ServeWish(what, adapters, tuple(follow), base=base, registry=root, **(plain | more))


def asked(root, *words, **more):
    """Return the base's name, and id, spec and alias of each adapter."""
    section, wanted = find_wanted(wish(root, *words, **more))
    return section.name, [(adapter.found.id, adapter.spec, adapter.alias) for adapter in wanted]


def test_a_base_an_adapter_or_both(stock):
    base, root = str(stock[0].files.folder), stock[1]
    assert asked(root, base) == (base, [])
    assert asked(root, "builtin:smollm2-135m") == ("builtin:smollm2-135m", [])
    assert asked(root, "home", base=base) == (base, [("home@3", "home", None)])
    assert asked(root, "home@1", base=base) == (base, [("home@1", "home@1", None)])
    assert asked(root, base, "home@2", "other") == (base, [("home@2", "home@2", None), ("other@1", "other", None)])
    section, wanted = find_wanted(wish(root, base, "blue=home@2", "home@2"))
    assert [one.found.name for one in wanted] == ["blue", "home"]
    assert wanted[0].found.digest == wanted[1].found.digest
    assert find_wanted(wish(root, base, quantization="nf4"))[0].quantization == "nf4"
    assert section.quantization == "none"


def test_an_alias_is_served_under_both_names(shelf, stock):
    registry.promote("home@2", "prod", root=shelf)
    base = str(stock[0].files.folder)
    assert asked(shelf, "prod", base=base) == (base, [("home@2", "prod", "prod")])


def test_a_runs_folder_is_its_adapter_and_an_adapter_of_the_registry_is_its_version(shelf, stock, tmp_path):
    base = str(stock[0].files.folder)
    run_folder = tmp_path / "run"
    shutil.copytree(shelf / "home" / "2", run_folder / "adapter")
    (_, [(id, spec, _)]) = asked(shelf, str(run_folder), base=base)
    assert id.startswith("adapter@sha256:"), "no passport says what it is called"
    assert spec == f"{run_folder}/adapter/"
    shutil.copytree(shelf / "home" / "2", tmp_path / "home")
    assert asked(shelf, str(tmp_path / "home"), base=base)[1] == [("home@2", "home@2", None)]
    elsewhere = adapter(tmp_path / "elsewhere", 99)
    (_, [(id, spec, _)]) = asked(shelf, base, f"mine={elsewhere}")
    assert id.startswith("mine@sha256:")
    assert spec == str(elsewhere)


def test_without_a_word_the_registry_says_it(shelf, stock, tmp_path):
    base = str(stock[0].files.folder)
    with pytest.raises(UsageError) as refused:
        asked(shelf)
    assert "home, other" in refused.value.message
    registry.promote("other@1", "prod", root=shelf)
    with pytest.raises(MissingInputError, match="other/1 was trained on x/y"):
        asked(shelf)
    fill_registry(tmp_path / "one", tmp_path / "work", {"only": 2})
    assert serve_verbs._only_one(tmp_path / "one") == "only"
    with pytest.raises(UsageError, match="empty"):
        asked(tmp_path / "nothing")
    assert asked(shelf, base=base) == (base, [])


@pytest.mark.parametrize(
    ("words", "more", "error"),
    [
        (("builtin:smollm2-135m",), {"base": "builtin:smollm2-135m"}, UsageError),
        (("builtin:smollm2-135m", "home@1", "home@2"), {}, UsageError),
        (("builtin:smollm2-135m", "no-such"), {}, MissingInputError),
        (("no-such",), {}, MissingInputError),
        (("builtin:smollm2-135m",), {"follow": ("no-such",)}, MissingInputError),
    ],
)
def test_what_cannot_be_meant_is_refused(stock, words, more, error):
    with pytest.raises(error):
        find_wanted(wish(stock[1], *words, **more))


def test_without_the_extra_the_way_to_get_it_is_said(monkeypatch, capsys, stock):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else there(name))
    assert run(["serve", "builtin:smollm2-135m", "--registry", str(stock[1])]) == 66
    said = capsys.readouterr().err
    assert "fastapi" in said
    assert "pip install 'lora-tune[serve]'" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--host", "0.0.0.0"], 77), (["--engine", "fast"], 2), (["--port", "70000"], 2), (["--api-key-file", "/no/such"], 66),
     (["--base", "builtin:smollm2-135m"], 2)],
)  # fmt: skip
def test_mistakes_have_their_exit_code_before_anything_is_loaded(capsys, stock, words, code, monkeypatch):
    monkeypatch.delenv("LORA_TUNE_API_KEY", raising=False)
    assert run(["serve", "builtin:smollm2-135m", "--registry", str(stock[1]), *words]) == code
    said = capsys.readouterr()
    assert "loading" not in said.err
    assert said.out == ""


class Start:
    """One start of a server on one state file, with what its command line wants."""

    def __init__(self, stock, root, tmp_path, *adapters):
        self._files = opened(stock[0], root, tmp_path / "state.jsonl")
        self._wish = wish(root, str(stock[0].files.folder), *adapters)
        self._started = tmp_path / "started"

    def __enter__(self):
        self.fleet = self._files.__enter__()
        self.words = load_wanted(self.fleet, find_wanted(self._wish)[1], started=self._started)
        return self

    def __exit__(self, *error):
        return self._files.__exit__(*error)

    def means(self, name):
        lease = self.fleet.lease(name, draw=0.0)
        lease.release()
        return lease.model


def test_a_new_command_line_takes_effect_where_nothing_was_promoted(stock, shelf, tmp_path):
    for number in ("1", "2", "1"):
        with Start(stock, shelf, tmp_path, f"home@{number}") as start:
            assert start.words == []
            assert start.means("home") == f"home@{number}"


def test_what_was_promoted_while_it_ran_stays(stock, shelf, tmp_path):
    with Start(stock, shelf, tmp_path, "home@1", "other") as start:
        start.fleet.load("home@2")
    for number in ("1", "3"):
        with Start(stock, shelf, tmp_path, f"home@{number}", "other") as start:
            (words,) = start.words
            assert f"home still means home@2, as it was changed while the server ran; the command line's home@{number}" in words  # fmt: skip
            assert start.means("home") == "home@2"
            assert start.means(f"home@{number}") == f"home@{number}"
            assert start.means("other") == "other@1"
    # Once the operator's version is promoted, the command line is followed again.
    with Start(stock, shelf, tmp_path, "home@3") as start:
        start.fleet.point("home", target="home@3")
    with Start(stock, shelf, tmp_path, "home@3") as start:
        assert start.words == []
    with Start(stock, shelf, tmp_path, "home@1") as start:
        assert start.words == []
        assert start.means("home") == "home@1"


def test_a_split_stays_and_an_alias_is_made_once(stock, shelf, tmp_path):
    registry.promote("home@1", "prod", root=shelf)
    with Start(stock, shelf, tmp_path, "prod", "other") as start:
        assert (start.means("prod"), start.means("home"), start.words) == ("home@1", "home@1", [])
        start.fleet.load("home@2", point=False)
        start.fleet.point("prod", split={"home@1": 0.5, "home@2": 0.5})
    registry.promote("home@3", "prod", root=shelf)
    with Start(stock, shelf, tmp_path, "prod", "other") as start:
        assert len(start.words) == 1
        assert "prod still means home@1 and home@2" in start.words[0]
        assert start.means("home") == "home@3"


def test_while_it_loads_it_is_alive_but_not_ready_and_then_takes_over(shelf, tiny_bases, monkeypatch):
    taken, told, listen = [], {}, api.listen
    monkeypatch.setattr(api, "listen", lambda *where: taken.append(listen(*where)) or taken[0])

    def ask(path):
        return httpx.get(f"http://127.0.0.1:{taken[0].getsockname()[1]}{path}")

    def progress(*_):
        told.update({path: ask(path) for path in ("/health", "/ready", "/v1/models")})

    server = open_server(wish(shelf, str(tiny_bases()), engine="simple"), progress)
    assert {path: answer.status_code for path, answer in told.items()} == {
        "/health": 200,
        "/ready": 503,
        "/v1/models": 503,
    }
    assert told["/v1/models"].json()["error"]["code"] == "loading"
    assert told["/ready"].headers["retry-after"] == "5"
    assert not [thread for thread in threading.enumerate() if thread.name == "loading"]
    # Who connects between the two waits, and is answered by the server.
    found = []
    early = threading.Thread(target=lambda: found.append(ask("/ready").status_code))
    early.start()
    running = api.make_server(server._app, drain_seconds=1.0)
    threading.Timer(0.3, running.drain).start()
    running.run(sockets=[server._listening])
    early.join(10)
    server.close()
    assert found == [200]


def test_a_damaged_note_of_the_last_start_is_no_obstacle(stock, shelf, tmp_path):
    for content in (b"\xff\xfe", b"[1, 2]", b"{", b'{"home": 7}'):
        with Start(stock, shelf, tmp_path, "home@1") as start:
            assert start.means("home") == "home@1"
        (tmp_path / "started").write_bytes(content)
