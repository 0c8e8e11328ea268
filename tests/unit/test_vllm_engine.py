"""The vllm engine against a server that speaks vLLM's routes as the real one was seen to (tests/vllm_stand_in.py says what)."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.adapter.door import open_adapter
from lora_tune.errors import (
    DrainingError,
    RequestError,
)
from lora_tune.model.dense import BaseFiles
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import BASE, Finish, Sampling, ServedBase, Token, Work
from lora_tune.serving.vllm import connect_vllm
from lora_tune.serving.vllm_child import ChildLimits
from lora_tune.serving.vllm_replica import read_piece
from tests.hostile import fitting
from tests.unit.test_door import write
from tests.vllm_stand_in import MAX_CONTEXT, VllmStandIn, answer_of, logprobs, next_token, until

LIMITS = ChildLimits(max_adapters=4, max_rank=16, max_running=4)
PROMPT = (5, 6, 7)


def ignore(*_):
    """Take no note."""


@pytest.fixture(scope="module")
def base(tiny_bases):
    folder = tiny_bases("llama")
    section = BaseSection(name=str(folder), dtype="fp32")
    return ServedBase("tiny", section, BaseFiles(str(folder), None, folder), None, (2,), 48, "0" * 64)


@pytest.fixture
def replicas():
    made = []

    def make(**how):
        made.append(VllmStandIn(**how))
        return made[-1]

    yield make
    for one in made:
        if not one.gone:
            one.close()


@contextmanager
def connected(base, *servers, limits=LIMITS, **environment):
    engine = connect_vllm(base, [server.url for server in servers], limits, environment)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def one(base, replicas):
    """An engine over one replica, and the replica."""
    server = replicas()
    with connected(base, server) as engine:
        yield engine, server


def adapter(folder, rank=2, **change):
    """A checked adapter that fits the tiny Llama; each rank has other weights."""
    change = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]} | change
    return open_adapter(write(folder, change, fitting(rank, dora=bool(change.get("use_dora")))))


class Listener:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.tokens, self.finishes, self._told = [], [], threading.Event()

    def __call__(self, event):
        if isinstance(event, Finish):
            self.finishes.append(event)
            self._told.set()
        else:
            assert not self.finishes, "a token after the end"
            self.tokens.append(event)

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    def finish(self):
        assert self._told.wait(20)
        return self.finishes[0]


def begin(engine, prompt=PROMPT, key=BASE, **sampling):
    listener = Listener()
    work = Work(tuple(prompt), key, Sampling(**{"max_tokens": 6} | sampling))
    return engine.submit(work, listener), listener


def ask(engine, prompt=PROMPT, key=BASE, **sampling):
    _, listener = begin(engine, prompt, key, **sampling)
    listener.finish()
    return listener


# --- answers


@given(
    prompt=st.lists(st.integers(0, 399), min_size=1, max_size=20), n_tokens=st.integers(1, 12), end=st.integers(0, 399)
)
def test_the_answer_is_the_servers_tokens_up_to_the_end(prompt, n_tokens, end):
    weights, tokens = "w", list(prompt)
    ended, told = False, []
    while not ended and len(tokens) < len(prompt) + n_tokens:
        tokens.append(next_token(weights, tokens))
        ended = tokens[-1] == end
        last = ended or len(tokens) == len(prompt) + n_tokens
        reason = ("stop" if ended else "length") if last else None
        piece = read_piece({"choices": [{"token_ids": tokens[-1:], "logprobs": None, "finish_reason": reason}]}, 0)
        told += [token.id for token in piece.tokens]
    assert told == answer_of(weights, prompt, n_tokens, {end})


def test_base_and_adapters_answer_each_with_its_own_weights_at_once(one, tmp_path):
    engine, _ = one
    made = {f"a--{rank}": adapter(tmp_path / f"r{rank}", rank) for rank in (1, 2, 3)}
    for key, files in made.items():
        engine.load(key, files)
    jobs = [(key, (1, 2, n)) for n in range(4) for key in (BASE, *made)]
    listeners = [begin(engine, prompt, key)[1] for key, prompt in jobs]
    for (key, prompt), listener in zip(jobs, listeners, strict=True):
        finish = listener.finish()
        digest = made[key].weights_digest if key else ""
        expected = answer_of(digest, prompt, 6, {2})
        assert listener.ids == expected
        assert finish.reason == ("length" if len(expected) == 6 else "stop")
        assert (finish.n_generated, finish.n_reused) == (len(expected), 3)
    facts = engine.facts()
    assert (facts.n_running, facts.n_waiting, facts.n_adapters) == (0, 0, 3)
    assert facts.n_tokens_generated == sum(len(listener.ids) for listener in listeners)
    assert facts.adapter_bytes == sum(files.weights_bytes for files in made.values())


def test_the_token_that_ends_the_answer_is_not_told(one, base):
    engine, server = one
    first = next_token("", PROMPT)
    engine._base = replace(base, ends=(first,))
    listener = ask(engine)
    assert (listener.ids, listener.finish().reason) == ([], "stop")
    listener = ask(engine, ignore_end=True)
    assert listener.ids == answer_of("", PROMPT, 6)
    assert server.bodies[-1]["stop_token_ids"] == []


def test_all_that_decides_the_answer_is_said_so_that_no_default_of_the_server_does(one):
    engine, server = one
    ask(engine, temperature=0.7, top_p=0.9, top_k=12, seed=5, max_tokens=3, n_logprobs=4, ignore_end=True)
    assert server.bodies[0] == {
        "model": "base", "prompt": list(PROMPT), "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 12, "seed": 5,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
        "stop_token_ids": [], "add_special_tokens": False, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "logprobs": 4, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    ask(engine)
    assert not {"seed", "logprobs"} & set(server.bodies[1])
    assert server.bodies[1]["stop_token_ids"] == [2]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_likeliest_tokens_come_first_and_the_chosen_one_only_if_it_is_one_of_them(k):
    event = {"choices": [{"token_ids": [9], "logprobs": logprobs(9, k), "finish_reason": None}]}
    assert read_piece(event, k).tokens == (Token(9, -9.0, tuple((1000 + n, -1.0 - n) for n in range(k))),)


def test_log_probabilities_are_told_when_they_are_asked_for(one):
    engine, _ = one
    assert all(token.logprob is None and token.top == () for token in ask(engine).tokens)
    assert all(token.logprob == -9.0 and token.top == () for token in ask(engine, n_logprobs=0).tokens)
    assert all(len(token.top) == 2 for token in ask(engine, n_logprobs=2).tokens)


def test_the_answer_ends_where_the_shorter_of_both_contexts_does(base, replicas):
    with connected(base, replicas()) as engine:
        assert engine.max_context_tokens == 48
        assert len(ask(engine, max_tokens=10_000, ignore_end=True).ids) == 48 - len(PROMPT)
        assert len(ask(engine, (1,) * 47, ignore_end=True).ids) == 1
        with pytest.raises(RequestError, match="48"):
            begin(engine, (1,) * 48)
    with connected(replace(base, max_context_tokens=4096), replicas()) as engine:
        assert engine.max_context_tokens == MAX_CONTEXT


def test_what_the_server_refuses_fails_the_answer_with_its_reason(one):
    finish = ask(one[0], (1, 450)).finish()  # the stand-in knows 400, the base 512
    assert (finish.reason, type(finish.error)) == ("failed", RequestError)
    assert "out of vocabulary" in str(finish.error)


# --- cancelling and closing


def test_a_cancelled_answer_ends_once_tells_nothing_more_and_ends_at_the_server_too(one):
    engine, server = one
    server.pause = 0.01
    answer, listener = begin(engine, max_tokens=40, ignore_end=True)
    assert until(lambda: len(listener.tokens) >= 3)
    for _ in range(3):
        answer.cancel()
    assert listener.finish().reason == "cancelled"
    n_told = len(listener.tokens)
    assert until(lambda: server.n_open == 0)
    assert server.n_sent["base"] < 40
    assert (len(listener.finishes), len(listener.tokens)) == (1, n_told)
    answer.cancel()


def test_an_answer_cancelled_before_it_began_still_ends(one):
    engine, server = one
    server.gate.clear()
    for _ in range(20):
        answer, listener = begin(engine)
        answer.cancel()
        assert listener.finish() == Finish("cancelled")
    assert until(lambda: server.n_open == 0)
    assert engine.facts().n_waiting == 0


def test_closing_ends_what_is_being_answered_and_leaves_nothing(base, replicas, tmp_path):
    server = replicas()
    with connected(base, server) as engine:
        engine.load("a--1", adapter(tmp_path / "a"))
        server.gate.clear()
        listeners = [begin(engine)[1] for _ in range(3)]
        folder = engine._folder
        engine.close()
        assert [listener.finishes for listener in listeners] == [[Finish("cancelled")]] * 3
    assert not folder.exists()
    assert server.adapters == {}
    with pytest.raises(DrainingError):
        begin(engine)
    with pytest.raises(DrainingError):
        engine.load("b--1", adapter(tmp_path / "b"))
    engine.unload("a--1")
    assert not [thread for thread in threading.enumerate() if thread.name == "vllm"]
