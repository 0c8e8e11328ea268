"""Several vLLM servers: who answers, what is lost when one goes, and what it gets when it comes back."""

from dataclasses import replace

import pytest

from lora_tune.errors import (
    BusyError,
    UnreachableError,
)
from lora_tune.serving.vllm import connect_vllm
from tests.unit import test_vllm_engine
from tests.unit.test_vllm_engine import LIMITS, PROMPT, adapter, ask, begin, connected
from tests.vllm_stand_in import answer_of, until

base = test_vllm_engine.base
replicas = test_vllm_engine.replicas


def test_answers_go_where_the_fewest_are_made(base, replicas):
    servers = [replicas() for _ in range(3)]
    with connected(base, *servers) as engine:
        for server in servers:
            server.gate.clear()
        listeners = [begin(engine)[1] for _ in range(9)]
        assert until(lambda: [server.n_open for server in servers] == [3, 3, 3])
        assert engine.facts().n_waiting == 9
        for server in servers:
            server.gate.set()
        assert all(listener.finish().reason != "failed" for listener in listeners)


def test_too_many_answers_are_refused(base, replicas, monkeypatch):
    monkeypatch.setattr("lora_tune.serving.vllm.MAX_WAITING", 2)
    server = replicas()
    with connected(base, server, limits=replace(LIMITS, max_running=1)) as engine:
        server.gate.clear()
        listeners = [begin(engine)[1] for _ in range(3)]
        with pytest.raises(BusyError):
            begin(engine)
        server.gate.set()
        assert all(listener.finish().reason != "failed" for listener in listeners)


def test_a_replica_that_dies_fails_only_what_it_had_begun(base, replicas):
    goes, stays = replicas(pause=0.02), replicas()
    with connected(base, goes, stays) as engine:
        stays.gate.clear()
        begun = begin(engine, max_tokens=40, ignore_end=True)[1]  # the first one
        held = begin(engine)[1]
        assert until(lambda: len(begun.tokens) >= 2 and stays.n_open == 1)
        goes.close()
        finish = begun.finish()
        assert finish.reason == "failed"
        assert isinstance(finish.error, UnreachableError)
        assert finish.n_generated == len(begun.tokens) < 40
        stays.gate.set()
        assert held.finish().reason != "failed"
        assert ask(engine).ids == answer_of("", PROMPT, 6, {2})


def test_an_answer_that_had_not_begun_moves_to_another_replica(base, replicas):
    goes, stays = replicas(), replicas()
    with connected(base, goes, stays) as engine:
        goes.gate.clear()
        listener = begin(engine)[1]
        assert until(lambda: goes.n_open == 1)
        goes.close()
        assert listener.finish().reason != "failed"
        assert listener.ids == answer_of("", PROMPT, 6, {2})


def test_a_replica_that_comes_back_gets_its_adapters_before_it_answers(base, replicas, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_tune.serving.vllm._LOOK_SECONDS", 0.05)
    server, files = replicas(), adapter(tmp_path / "a")
    with connected(base, server) as engine:
        engine.load("a--1", files)
        assert engine.can_answer()
        server.close()
        assert isinstance(ask(engine, key="a--1").finish().error, UnreachableError)
        assert not engine.can_answer()
        again = replicas(port=server.port)
        assert until(lambda: ask(engine, key="a--1").finish().reason != "failed")
        assert engine.can_answer()
        assert ask(engine, key="a--1").ids == answer_of(files.weights_digest, PROMPT, 6, {2})
        assert len(again.adapters) == 1


def test_the_key_is_sent_and_a_wrong_one_is_said(base, replicas, tmp_path):
    server = replicas(api_key="right")
    with connected(base, server, LORA_TUNE_VLLM_API_KEY="right") as engine:
        engine.load("a--1", adapter(tmp_path / "a"))
        assert ask(engine, key="a--1").finish().reason != "failed"
    with pytest.raises(UnreachableError, match="refuses our key") as caught:
        connect_vllm(base, [server.url], LIMITS, {"LORA_TUNE_VLLM_API_KEY": "wrong"})
    assert "wrong" not in str(caught.value)


def test_the_adapters_lie_where_other_machines_see_them(base, replicas, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    with connected(base, replicas(), LORA_TUNE_VLLM_SHARED=str(shared)) as engine:
        engine.load("a--1", adapter(tmp_path / "a"))
        assert len(list(shared.glob("*/a--1--*/adapter_model.safetensors"))) == 1
    assert list(shared.iterdir()) == []


def test_nothing_there_and_what_is_no_vllm_are_said(base, replicas):
    server = replicas()
    server.base = 5
    with pytest.raises(UnreachableError, match="not vLLM's"):
        connect_vllm(base, [server.url], LIMITS, {})
    server.close()
    with pytest.raises(UnreachableError, match="cannot be reached"):
        connect_vllm(base, [server.url], LIMITS, {})
    with pytest.raises(UnreachableError):
        connect_vllm(base, ["nonsense"], LIMITS, {})


@pytest.mark.parametrize("status", [413, 422, 500])
def test_an_odd_answer_takes_no_replica_from_the_others(base, replicas, status):
    servers = [replicas(), replicas()]
    with connected(base, *servers) as engine:
        for server in servers:
            server.status = status
        assert ask(engine).finish().reason == "failed"
        assert all(replica.is_up for replica in engine._replicas)
        for server in servers:
            server.status = 200
        assert ask(engine).finish().reason != "failed"
