"""What clients send along, names with slashes, failures that tell nothing outside, and looks that never wait."""

import json
import logging
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from openai import OpenAI

from lora_tune.errors import LoraTuneError, OutOfMemoryError
from lora_tune.serving import prompts
from lora_tune.serving.answers import Answer
from lora_tune.serving.engine import Sampling, Token, Work
from tests import live_api
from tests.live_api import live
from tests.tiny import TEMPLATES
from tests.unit.test_prompts import served, version

CHAT = [{"role": "user", "content": "turn on the lights"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("clients")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return server.openai()


def test_names_of_speakers_change_nothing(server, client):
    named = [{"role": "system", "content": "Be kind.", "name": "rules"}, {"role": "user", "content": "hello", "name": "ann"},
             {"role": "assistant", "content": "hi", "name": "bot"}, CHAT[0] | {"name": "ann"}]  # fmt: skip
    plain = [{key: value for key, value in message.items() if key != "name"} for message in named]
    answer = client.chat.completions.create(model="home", messages=named, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == server.text("home@3", plain, 8)


def test_an_answer_is_taken_back_as_the_client_dumps_it(server, client):
    first = client.chat.completions.create(model="home", messages=CHAT, max_tokens=8, temperature=0)
    said = first.choices[0].message
    dumped = said.model_dump()
    assert {"annotations", "audio", "function_call"} <= dumped.keys()
    for fed_back in (said, dumped, dumped | {"annotations": []}):
        asked = [*CHAT, fed_back, {"role": "user", "content": "thanks"}]
        answer = client.chat.completions.create(model="home", messages=asked, max_tokens=8, temperature=0)
        plain = [*CHAT, {"role": "assistant", "content": said.content}, {"role": "user", "content": "thanks"}]
        assert answer.choices[0].message.content == server.text("home@3", plain, 8)


def test_a_base_of_the_hub_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(live_api, "bare_base", partial(live_api.bare_base, name="Org/Tiny-1B"))
    with live(tmp_path) as server, server.http() as client:
        assert server.openai().models.retrieve("Org/Tiny-1B").id == "Org/Tiny-1B"
        for path in ("Org/Tiny-1B", "Org%2FTiny-1B"):
            assert client.get(f"/v1/models/{path}").json()["kind"] == "base"
        for path in ("Org", "Tiny-1B", "Org/Tiny-1B/", "", "home/x"):
            answer = client.get(f"/v1/models/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [LoraTuneError("KeyError: 'secret words'"), OutOfMemoryError("no memory is left")])
def test_a_bug_of_the_engine_is_told_to_the_operator_only(server, caplog, error, stream):
    caplog.set_level(logging.INFO, logger="lora_tune.serving")
    server.engine.token_error = error
    asked = {"model": "home", "messages": CHAT, "max_tokens": 4, "stream": stream, "n": 2}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=asked, headers={"x-request-id": "mine"})
    is_bug = type(error) is LoraTuneError
    assert ("the engine failed" in answer.text, "engine_failed" in answer.text) == (is_bug, is_bug)
    assert (error.message in answer.text) != is_bug
    assert stream or answer.status_code == error.http_status
    assert live_api.until(server.idle)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "lora_tune.serving"]
    (line,) = [line for line in lines if line["event"] == "failure"]
    assert (line["id"], line["kind"], line["message"]) == ("mine", type(error).__name__, error.message)


def test_a_bug_in_a_load_is_told_to_the_operator_only(server, caplog):
    caplog.set_level(logging.INFO, logger="lora_tune.serving")
    server.engine.load_error = LoraTuneError("KeyError: 'secret words'")
    with server.http() as http:
        answer = http.post("/v1/adapters", json={"source": "office@1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
    assert "secret" not in answer.text
    assert any("secret words" in record.getMessage() for record in caplog.records)


def test_looks_do_not_wait_for_loads(server):
    """Every thread for changes is held, and the scrape and the list still come."""
    serving, free = server.server.config.app.state.serving, threading.Event()
    held = [serving.changes.submit(free.wait, 20) for _ in range(8)]
    try:
        with server.http() as http:
            for path in ("/metrics", "/v1/adapters"):
                assert http.get(path, timeout=5).status_code == 200
    finally:
        free.set()
    assert all(waiting.result(20) for waiting in held)


def test_answers_are_decoded_without_the_versions_own_tokenizer(tmp_path, monkeypatch):
    """It is slow to load, and answers are made on the event loop; only its template is another."""
    base, own = served(tmp_path), version(TEMPLATES["plain"])
    ids = base.tokenizer("turn on the radio")["input_ids"]
    expected = prompts.tokenizer_of(base, own).decode(ids, skip_special_tokens=True)

    def never(*_given):
        raise AssertionError("a tokenizer was loaded")

    monkeypatch.setattr(prompts, "_fenced", never)
    assert prompts.encode(base, own, "turn on the radio") == ids
    request = SimpleNamespace(serving=SimpleNamespace(fleet=SimpleNamespace(base=base)))
    answer = Answer(request, own, Work(tuple(ids), own.key, Sampling(8)), ())
    for token in ids:
        answer.feed(Token(token))
    piece = answer.take()
    assert piece is not None
    assert expected.startswith(piece.text)
    assert piece.text
