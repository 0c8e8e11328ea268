"""The openai client against a real server: what it reads is what the engine's script says."""

import math

import openai
import pytest

from tests.live_api import live
from tests.scripted_engine import distribution

CHAT = [{"role": "user", "content": "turn on the lights"}]
BASE = "tiny-base"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("api")) as running:
        running.fleet.load("office")
        running.fleet.load("home@1", point=False)
        running.fleet.point("prod", target="home@3")
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


@pytest.mark.parametrize("model", [BASE, "home", "home@3", "home@1", "office", "prod"])
def test_a_chat_is_answered_by_what_was_asked(server, client, model):
    said = {"home": "home@3", "office": "office@1", "prod": "home@3"}.get(model, model)
    answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=12, temperature=0)
    assert answer.model == said
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.content == server.text(said, CHAT, 12)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (12, len(server_prompt(server)))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    digests = {version.id: version.digest for version in server.fleet.versions()}
    assert answer.system_fingerprint.startswith("base-")
    assert said == BASE or answer.system_fingerprint.endswith(f"+{digests[said][:12]}")


def server_prompt(server):
    from lora_tune.serving.prompts import render

    return render(server.base, None, CHAT)


@pytest.mark.parametrize("model", [BASE, "home"])
def test_a_stream_joined_is_the_answer(server, client, model):
    stream = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "home@3" if model == "home" else model
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == server.text(said, CHAT, 30)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert {chunk.model for chunk in chunks} == {said}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 30)


def test_a_stream_without_usage_says_none(client):
    chunks = list(client.chat.completions.create(model=BASE, messages=CHAT, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_seeds_of_their_own(server, client, stream):
    asked = {"model": "home", "messages": CHAT, "max_tokens": 8, "temperature": 0.5, "seed": 7, "n": 3}
    expected = [server.text("home@3", CHAT, 8, salt=f"|0.5|{7 + index}") for index in range(3)]
    if stream:
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = client.chat.completions.create(**asked)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.completion_tokens == 24
        texts = [choice.message.content for choice in answer.choices]
    assert texts == expected
    assert len(set(texts)) == 3


def test_the_default_temperature_is_openais(server, client):
    answer = client.chat.completions.create(model=BASE, messages=CHAT, max_tokens=8, seed=1)
    assert answer.choices[0].message.content == server.text(BASE, CHAT, 8, salt="|1.0|1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_it_ends_before_a_stop_string(server, client, stream, kind):
    prompt = CHAT if kind == "chat" else "open the door"
    whole = server.text("home@3", prompt, 200)
    stop = whole[21:24]
    shared = {"model": "home", "max_tokens": 200, "temperature": 0, "stop": ["\x00never", stop], "stream": stream}
    if kind == "chat":
        answer = client.chat.completions.create(messages=prompt, **shared)
    else:
        answer = client.completions.create(prompt=prompt, **shared)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join((chunk.delta.content if kind == "chat" else chunk.text) or "" for chunk in chunks)
        reasons = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    else:
        choice = answer.choices[0]
        text, reasons = (choice.message.content if kind == "chat" else choice.text), [choice.finish_reason]
        assert answer.usage.completion_tokens < 200
    assert text == whole[: whole.index(stop)]
    assert reasons == ["stop"]


def test_a_finished_prompt_goes_on(server, client):
    answer = client.completions.create(model="home@1", prompt="close the blinds", temperature=0)
    assert answer.choices[0].text == server.text("home@1", "close the blinds", 16)
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 16
    ids = server.base.tokenizer("close the blinds")["input_ids"]
    for prompt in (ids, [ids], ["close the blinds"]):
        again = client.completions.create(model="home@1", prompt=prompt, temperature=0)
        assert again.choices[0].text == answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [0, 1, 5, 20])
def test_log_probabilities_of_a_chat(server, client, asked, stream):
    found = client.chat.completions.create(
        model="home", messages=CHAT, max_tokens=9, temperature=0, logprobs=True, top_logprobs=asked, stream=stream
    )
    if stream:
        facts = [fact for chunk in found if chunk.choices[0].logprobs for fact in chunk.choices[0].logprobs.content]
    else:
        facts = found.choices[0].logprobs.content
    ids = server.ids("home@3", CHAT, 9)
    prompt = server_prompt(server)
    assert len(facts) == 9
    assert bytes(byte for fact in facts for byte in fact.bytes).decode("utf-8", "replace") == server.text(
        "home@3", CHAT, 9
    )
    for place, fact in enumerate(facts):
        likeliest = distribution(server.content("home@3"), [*prompt, *ids[:place]])
        assert math.isclose(fact.logprob, likeliest[0][1])
        assert [top.logprob for top in fact.top_logprobs] == pytest.approx([value for _, value in likeliest[:asked]])


def test_log_probabilities_of_a_completion(server, client):
    answer = client.completions.create(model=BASE, prompt="open the door", max_tokens=7, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 7
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs)


def test_log_probabilities_end_with_the_text(server, client):
    whole = server.text("home@3", CHAT, 60)
    answer = client.chat.completions.create(
        model="home", messages=CHAT, max_tokens=60, temperature=0, logprobs=True, stop=whole[15:18]
    )
    choice = answer.choices[0]
    shown = bytes(byte for fact in choice.logprobs.content for byte in fact.bytes).decode("utf-8", "replace")
    assert shown.startswith(choice.message.content)
    assert len(choice.logprobs.content) < answer.usage.completion_tokens + 1


def test_models_are_the_base_the_names_and_the_versions(client):
    listed = {model.id: model for model in client.models.list()}
    assert {BASE, "home", "office", "prod", "home@3", "home@1", "office@1"} == set(listed)
    assert client.models.retrieve("prod").id == "prod"
    assert client.models.retrieve("prod").target == {"home@3": 1.0}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_unknown_model_is_never_answered_by_the_base(client):
    for model in ("hoome", "home@2", "home@sha256:000000000000", "gpt-4", "../x", "home@3 "):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=model, messages=CHAT)
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("change", "param"),
    [({"temperature": 3}, "temperature"), ({"n": 5}, "n"), ({"n": -1}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 10**6}, "max_tokens"),
     ({"top_p": 0}, "top_p"), ({"stop": [""]}, "stop"), ({"stop": list("abcde")}, "stop"), ({"stop": "x" * 65}, "stop"), ({"logit_bias": {"1": 5}}, "logit_bias"),
     ({"presence_penalty": 1}, "presence_penalty"), ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"), ({"top_logprobs": 2}, ""),
     ({"response_format": {"type": "json_object"}}, "response_format"), ({"extra_body": {"best": 1}}, "best"), ({"extra_body": {"chat_template": "x"}}, "chat_template"),
     ({"messages": []}, "messages"), ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "messages"), ({"messages": [{"role": "user", "content": "light " * 600}]}, "messages"),
     ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages"), ({"seed": 2**63}, "seed"), ({"user": "x" * 600}, "user")],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_with_its_field(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "home", "messages": CHAT} | change))
    assert (caught.value.param or "").split(".")[0] == param
    assert caught.value.type == "invalid_request_error"


def test_what_other_clients_send_along_is_taken(client):
    client.chat.completions.create(
        model="home", messages=[{"role": "developer", "content": "Be kind."}, *CHAT], max_completion_tokens=2, user="u",
        metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, response_format={"type": "text"},
        extra_body={"ignore_eos": True, "top_k": 5}, top_p=0.9,
    )  # fmt: skip


def test_an_answer_that_fails_says_so(server, client):
    from lora_tune.errors import OutOfMemoryError

    server.engine.token_error = OutOfMemoryError("no memory is left")
    with pytest.raises(openai.InternalServerError, match="no memory is left"):
        client.chat.completions.create(model="home", messages=CHAT, max_tokens=4)
    server.engine.token_error = OutOfMemoryError("no memory is left")
    with pytest.raises(openai.APIError, match="no memory is left"):
        list(client.chat.completions.create(model="home", messages=CHAT, max_tokens=4, stream=True))


def test_many_at_once_get_their_own_answers(server):
    from concurrent.futures import ThreadPoolExecutor

    models = ["home@1", "home@3", "office@1", BASE] * 6

    def ask(number):
        model, words = models[number], [{"role": "user", "content": f"turn on the lights {number}"}]
        stream = server.openai().chat.completions.create(
            model=model, messages=words, max_tokens=40, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream) == server.text(model, words, 40)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(len(models))))
