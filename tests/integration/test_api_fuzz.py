"""Requests made from our own OpenAPI description, right and wrong: never a 5xx, and every refusal is an error body."""

import json
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from lora_tune.serving.api import describe, make_app
from tests.live_api import ADMIN, live

KEY = {"authorization": f"Bearer {ADMIN}"}
ERROR_FIELDS = {"message", "type", "code", "param", "hint"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("fuzz")) as running:
        yield running


def fuzz(server, n_cases_each):
    """Send so many right and so many wrong requests to every route; return how often each status came."""
    seen = Counter()
    app = make_app(server.fleet, server.settings)
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(describe(app))))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 17
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not len(operation.body):
                continue  # nothing of it can be wrong

            @settings(max_examples=n_cases_each, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
                      phases=[Phase.generate])  # fmt: skip
            @given(case=operation.as_strategy(mode), deeper=st.booleans())
            def send(case, deeper):
                if deeper and isinstance(case.body, dict) and "model" in case.body:
                    # Past the first refusals: what is wrong further in is reached only with a model that is there.
                    case.body |= {"model": "home"} | ({"max_tokens": 3} if "max_tokens" in case.body else {})
                answer = case.call(base_url=server.url, headers=KEY, session=server.session)
                seen[answer.status_code] += 1
                assert answer.status_code < 500 or (case.path == "/ready"), (case.as_curl_command(), answer.text)
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == ERROR_FIELDS, (case.as_curl_command(), answer.text)

            send()
    return seen


def still_works(server):
    with server.http() as client:
        asked = {
            "model": "home@3",
            "messages": [{"role": "user", "content": "open the door"}],
            "max_tokens": 4,
            "temperature": 0,
        }
        client.post("/v1/adapters", json={"source": "home@3"})
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["message"]["content"] == server.text("home@3", asked["messages"], 4)


@pytest.fixture
def fuzzed(server):
    import requests

    from tests.live_api import ApiSettings

    server.settings = ApiSettings(admin_keys=(ADMIN,))
    with requests.Session() as session:
        server.session = session
        yield server


def test_no_request_breaks_the_server(fuzzed):
    seen = fuzz(fuzzed, 6)
    assert seen.total() >= 100
    assert {200, 400, 404} <= set(seen)
    still_works(fuzzed)


@pytest.mark.slow
def test_no_request_of_thousands_breaks_the_server(fuzzed):
    seen = fuzz(fuzzed, 100)
    assert seen.total() >= 1_000
    still_works(fuzzed)
