"""Swaps, splits and shadows over HTTP; clients that leave; what is counted; how the server ends."""

import random
import socket
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_tune.serving.metrics import MAX_VERSIONS, Metrics
from tests.live_api import ADMIN, live, until

WORDS = [{"role": "user", "content": "turn on the radio"}]


@pytest.fixture
def server(tmp_path):
    with live(tmp_path) as running:
        yield running


def chat(client, model="home", **more):
    return client.post(
        "/v1/chat/completions", json={"model": model, "messages": WORDS, "max_tokens": 6, "temperature": 0} | more
    )


def chat_alone(server, **more):
    with server.http() as client:
        return chat(client, **more)


def metric(server, name, **labels):
    with server.http() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return sum(
            sample.value for family in families for sample in family.samples
            if sample.name == f"lora_tune_{name}" and labels.items() <= sample.labels.items()
        )  # fmt: skip


def test_a_version_is_loaded_pointed_to_rolled_back_and_unloaded(server):
    with server.http() as client:
        loaded = client.post("/v1/adapters", json={"source": "home@1", "point": False})
        assert loaded.status_code == 201
        adapter = loaded.json()
        assert (adapter["id"], adapter["name"], adapter["verdict"], adapter["in_flight"]) == (
            "home@1",
            "home",
            "unverified",
            0,
        )
        assert (adapter["rank"], adapter["aliases"], len(adapter["digest"])) == (2, [], 64)
        assert chat(client).json()["model"] == "home@3"
        pointed = client.put("/v1/aliases/home", json={"target": "home@1"})
        assert pointed.json() == {"alias": "home", "target": {"home@1": 1.0}, "shadow": None}
        answer = chat(client).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (
            "home@1",
            server.text("home@1", WORDS, 6),
        )
        assert client.delete("/v1/adapters/home@1").status_code == 409
        assert client.post("/v1/aliases/home/rollback").json()["target"] == {"home@3": 1.0}
        assert client.delete("/v1/adapters/home@1").status_code == 204
        assert chat(client, "home@1").status_code == 404
        listed = client.get("/v1/adapters").json()
        assert [adapter["id"] for adapter in listed["adapters"]] == ["home@3"]
        assert {stored["id"]: stored["loaded"] for stored in listed["registry"]} == {
            "home@1": False, "home@2": False, "home@3": True, "office@1": False,
        }  # fmt: skip
        assert listed["aliases"] == [{"alias": "home", "target": {"home@3": 1.0}, "shadow": None}]


def test_what_cannot_be_done_says_why(server):
    with server.http() as client:
        for method, path, body, status in [
            ("POST", "/v1/adapters", {"source": "nobody"}, 404), ("POST", "/v1/adapters", {"source": "/etc"}, 412), ("POST", "/v1/adapters", {"source": "../../etc"}, 412),
            ("POST", "/v1/adapters", {"source": "home", "name": "../x"}, 400), ("POST", "/v1/adapters", {"source": "home", "extra": 1}, 400), ("POST", "/v1/adapters", {}, 400),
            ("PUT", "/v1/aliases/prod", {}, 400), ("PUT", "/v1/aliases/prod", {"target": "home@2"}, 404), ("PUT", "/v1/aliases/Bad%20Name", {"target": "home@3"}, 400),
            ("PUT", "/v1/aliases/prod", {"split": {"home@3": 0.5}}, 400), ("PUT", "/v1/aliases/prod", {"split": {"home@3": 1.0}, "target": "home@3"}, 400),
            ("PUT", "/v1/aliases/tiny-base", {"target": "home@3"}, 409), ("POST", "/v1/aliases/nobody/rollback", None, 404), ("DELETE", "/v1/adapters/nobody", None, 404),
            ("DELETE", "/v1/aliases/nobody", None, 404), ("GET", "/nowhere", None, 404), ("PATCH", "/v1/adapters", {}, 405), ("POST", "/v1/chat/completions/", {}, 404),
        ]:  # fmt: skip
            answer = client.request(method, path, json=body)
            assert answer.status_code == status, (method, path, body, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "code", "param", "hint"}
        assert server.engine.loads == ["home--" + server.fleet.versions()[0].digest[:12]]


def test_vllms_clients_load_and_unload(server):
    with server.http() as client:
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "office", "lora_path": "office@1"})
        assert (loaded.status_code, "Success" in loaded.text) == (200, True)
        assert chat(client, "office").json()["model"] == "office@1"
        more = {"lora_name": "office", "lora_path": "office@1", "load_inplace": True, "base_model_name": "tiny-base"}
        assert client.post("/v1/load_lora_adapter", json=more).status_code == 200
        asked = {"lora_name": "office", "lora_int_id": 7}
        assert client.post("/v1/unload_lora_adapter", json=asked).status_code == 200
        assert chat(client, "office").status_code == 404


def test_a_split_is_answered_by_its_versions(server):
    with server.http() as client:
        client.post("/v1/adapters", json={"source": "home@1", "point": False})
        client.put("/v1/aliases/prod", json={"split": {"home@1": 0.5, "home@3": 0.5}})
        answers = [chat(client, "prod").json() for _ in range(40)]
        assert {answer["model"] for answer in answers} == {"home@1", "home@3"}
        for answer in answers:
            assert answer["choices"][0]["message"]["content"] == server.text(answer["model"], WORDS, 6)


def test_a_shadow_runs_along_and_is_thrown_away(server):
    with server.http() as client:
        client.post("/v1/adapters", json={"source": "home@1", "point": False})
        client.put("/v1/aliases/prod", json={"target": "home@3", "shadow": "home@1"})
        before = server.engine.facts().n_tokens_generated
        answer = chat(client, "prod", n=2).json()
        assert answer["model"] == "home@3"
        assert {choice["message"]["content"] for choice in answer["choices"]} == {server.text("home@3", WORDS, 6)}
        assert until(server.idle)
        assert server.engine.facts().n_tokens_generated == before + 2 * 2 * 6
        assert metric(server, "shadow_answers_total", version="home@1", finish="length") == 2
        assert client.put("/v1/aliases/prod", json={"shadow": None}).json()["shadow"] is None
        chat(client, "prod")
        assert metric(server, "shadow_answers_total", version="home@1") == 2
        assert client.delete("/v1/aliases/prod").status_code == 204
        assert chat(client, "prod").status_code == 404


def test_a_shadow_that_fails_changes_nothing(tmp_path):
    with live(tmp_path, max_waiting=1, max_running=1, token_seconds=0.01) as server, server.http() as client:
        client.post("/v1/adapters", json={"source": "home@1", "point": False})
        client.put("/v1/aliases/prod", json={"target": "home@3", "shadow": "home@1"})
        answer = chat(client, "prod")
        assert answer.json()["choices"][0]["message"]["content"] == server.text("home@3", WORDS, 6)


def test_running_answers_keep_their_version_while_the_name_moves(tmp_path):
    """Streams under swaps: each is one version's answer, whole; none is lost."""
    with live(tmp_path, token_seconds=0.002) as server, server.http() as admin:
        stop, wrong, done = threading.Event(), [], []

        def ask(seed):
            with server.http() as client:
                while not stop.is_set():
                    words = [{"role": "user", "content": f"turn on {seed}"}]
                    answer = chat(client, messages=words, max_tokens=25)
                    said = answer.json()
                    done.append(1)
                    if answer.status_code != 200 or said["choices"][0]["message"]["content"] != server.text(
                        said["model"], words, 25
                    ):
                        wrong.append(answer.text)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for number in range(30):
            assert admin.post("/v1/adapters", json={"source": f"home@{1 + number % 3}"}).status_code == 201
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert wrong == []
        assert len(done) > 10
        assert metric(server, "swaps_total") >= 29


def drop_after(server, n_bytes, *, stream):
    """Ask, read so much, and leave."""
    body = httpx.Request(
        "POST",
        server.url,
        json={"model": "home", "messages": WORDS, "max_tokens": 400, "stream": stream, "temperature": 0},
    ).content
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(head.encode() + body)
    connection.settimeout(10)
    left = n_bytes
    while left > 0:
        left -= len(connection.recv(min(left, 4096)))
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_cost_a_token_and_leak_nothing(tmp_path, stream):
    with live(tmp_path, token_seconds=0.003) as server:
        generator = random.Random(0)
        for _ in range(10):
            drop_after(server, generator.randrange(1, 3_000) if stream else 0, stream=stream)
            if not stream:
                time.sleep(generator.random() * 0.05)
        assert until(server.idle, 5)
        made = server.engine.facts().n_tokens_generated
        time.sleep(0.1)
        assert server.engine.facts().n_tokens_generated == made
        assert made < 10 * 400 / 2
        with server.http() as client:
            assert chat(client).status_code == 200


def test_a_client_that_leaves_stops_the_engine_within_a_token(tmp_path):
    with live(tmp_path, token_seconds=0.05) as server:
        drop_after(server, 1_000, stream=True)
        time.sleep(0.02)
        left = server.engine.facts().n_tokens_generated
        assert until(server.idle, 5)
        assert server.engine.facts().n_tokens_generated <= left + 1


@pytest.mark.slow
def test_of_100_clients_that_leave_at_any_token_none_costs_more_than_one_token_or_leaves_a_place_taken(tmp_path):
    with live(tmp_path, token_seconds=0.02) as server:
        chance = random.Random(1)
        for number in range(100):
            stream = number % 4 > 0
            drop_after(server, chance.randrange(1, 4_000) if stream else 0, stream=stream)
            if not stream:
                time.sleep(chance.random() * 0.2)
            left = server.engine.facts().n_tokens_generated
            assert until(server.idle, 5)
            assert server.engine.facts().n_tokens_generated <= left + 1, number
        assert server.engine.facts().n_running == server.engine.facts().n_waiting == 0
        assert set(server.fleet.in_flight().values()) == {0}


def test_an_answer_that_waits_is_dropped_with_its_client(tmp_path):
    with live(tmp_path) as server:
        server.engine.pause()
        drop_after(server, 0, stream=False)
        drop_after(server, 1, stream=True)
        assert until(server.idle, 5)
        server.engine.resume()


def test_a_full_engine_says_429_and_when_to_come_back(tmp_path):
    with live(tmp_path, max_waiting=2, max_running=1) as server, server.http() as client:
        server.engine.pause()
        threads = [threading.Thread(target=chat_alone, args=(server,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert until(lambda: server.engine.facts().n_waiting + server.engine.facts().n_running >= 2)
        answers = [chat(client, n=4) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {429}
        assert answers[0].headers["retry-after"] == "1"
        server.engine.resume()
        for thread in threads:
            thread.join(10)


def test_the_figures_are_those_of_the_answers(server):
    with server.http() as client:
        first = chat(client, n=2).json()
        chat(client, "tiny-base")
        assert until(server.idle)
        assert metric(server, "generated_tokens_total", version="home@3") == first["usage"]["completion_tokens"] == 12
        assert metric(server, "prompt_tokens_total", version="home@3") == first["usage"]["prompt_tokens"]
        assert metric(server, "answers_total", version="home@3", finish="length") == 2
        assert metric(server, "answers_total", version="tiny-base") == 1
        assert metric(server, "time_to_first_token_seconds_count", version="home@3") == 1
        assert metric(server, "answer_seconds_count", version="home@3") == 2
        assert (metric(server, "adapter_slots_used"), metric(server, "adapter_slots")) == (1, 16)
        assert metric(server, "engine_generated_tokens_total") == 18
        assert metric(server, "in_flight") == 0
        assert metric(server, "ready") == 1


def test_versions_that_are_gone_make_room_in_the_figures(server):
    figures = Metrics(server.fleet)
    for number in range(3 * MAX_VERSIONS):
        figures.answered(f"gone@{number}", "stop", n_tokens=1, n_reused=0, seconds=0.1)
    figures.answered("home@3", "stop", n_tokens=1, n_reused=0, seconds=0.1)
    labels = {
        sample.labels["version"] for family in text_string_to_metric_families(figures.text().decode())
        for sample in family.samples if sample.name == "lora_tune_generated_tokens_total"
    }  # fmt: skip
    assert len(labels) <= MAX_VERSIONS
    assert "home@3" in labels


def test_it_drains_what_was_begun_and_takes_nothing_new(tmp_path):
    with live(tmp_path, token_seconds=0.02) as server, server.http() as client:
        found = []
        begun = threading.Thread(target=lambda: found.append(chat_alone(server, max_tokens=60)))
        begun.start()
        assert until(lambda: server.engine.facts().n_running)
        assert client.get("/ready").status_code == 200
        server.server.handle_exit(15, None)
        assert until(lambda: client.get("/ready").status_code == 503)
        refused = chat(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert client.get("/health").status_code == 200
        begun.join(20)
        assert found[0].json()["choices"][0]["message"]["content"] == server.text("home@3", WORDS, 60)


def test_a_server_whose_engine_has_stopped_is_alive_but_not_ready(server):
    with server.http() as client:
        assert client.get("/ready").status_code == 200
        server.engine.close()  # as if its thread had died
        answer = client.get("/ready")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert metric(server, "ready") == 0
        assert client.get("/health").status_code == 200
        assert chat(client).status_code == 503


def test_every_route_is_described_and_listed(server):
    with server.http(ADMIN) as client:
        described = client.get("/openapi.json").json()
        assert described["components"]["schemas"]["ChatBody"]["additionalProperties"] is False
        policies = {facts["x-policy"] for methods in described["paths"].values() for facts in methods.values()}
        assert policies == {"open", "api", "admin"}
        page = client.get("/docs").text
        assert all(path in page for path in described["paths"])
        assert "http" not in page.replace("https", "http").lower()  # nothing from elsewhere
