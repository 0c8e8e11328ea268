"""Adapters in vLLM servers: checked copies under names that are never used again, on every replica or on none."""

import json

import pytest

from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    ConflictError,
    MissingInputError,
    UnreachableError,
    UnsupportedError,
)
from tests.hostile import fitting
from tests.unit import test_vllm_engine
from tests.unit.test_door import write
from tests.unit.test_vllm_engine import PROMPT, adapter, ask, begin, connected
from tests.vllm_stand_in import answer_of

base = test_vllm_engine.base
replicas = test_vllm_engine.replicas
one = test_vllm_engine.one


def test_an_adapter_that_was_never_loaded_or_is_unloaded_is_never_answered_for(one, tmp_path):
    engine, server = one
    server.keeps_unloaded = True
    with pytest.raises(MissingInputError):
        begin(engine, key="a--1")
    engine.load("a--1", adapter(tmp_path / "a"))
    ask(engine, key="a--1")
    engine.unload("a--1")
    assert len(server.adapters) == 1, "this server goes on answering for it"
    with pytest.raises(MissingInputError):
        begin(engine, key="a--1")


def test_no_name_is_ever_used_again(base, replicas, tmp_path):
    server, files = replicas(), adapter(tmp_path / "a")
    for _ in range(2):
        with connected(base, server) as engine:
            for _ in range(3):
                engine.load("a--1", files)
                assert ask(engine, key="a--1").ids == answer_of(files.weights_digest, PROMPT, 6, {2})
                engine.unload("a--1")
    assert len(set(server.names_seen)) == len(server.names_seen) == 6
    assert all(name.startswith("a--1--") for name in server.names_seen)


def test_the_server_reads_what_was_checked_and_a_config_of_ours(one, tmp_path):
    engine, server = one
    files = adapter(tmp_path / "a", use_rslora=True, megatron_core="evil.module", base_model_name_or_path="/etc/passwd")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"pickle")
    engine.load("a--1", files)
    (config,) = server.configs.values()
    assert config["use_rslora"] is True
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
    assert "evil" not in json.dumps(config)
    assert "/etc" not in json.dumps(config)
    assert sorted(path.name for path in next(engine._folder.iterdir()).iterdir()) == [CONFIG, WEIGHTS]


def test_weights_changed_since_they_were_checked_are_refused_and_leave_nothing(one, tmp_path):
    engine, server = one
    files = adapter(tmp_path / "a")
    write(tmp_path / "a", {"r": 3}, fitting(3))
    with pytest.raises(AdapterMismatchError):
        engine.load("a--1", files)
    assert list(engine._folder.iterdir()) == []
    assert server.names_seen == []
    engine.load("a--1", adapter(tmp_path / "b"))


@pytest.mark.parametrize(
    ("change", "error"),
    [({"use_dora": True}, UnsupportedError), ({"rank": 17}, UnsupportedError)],
)
def test_what_vllm_would_not_load_is_refused_before_it_is_asked(one, tmp_path, change, error):
    engine, server = one
    with pytest.raises(error) as caught:
        engine.load("a--1", adapter(tmp_path / "a", **change))
    assert "--engine" in caught.value.hint
    assert server.names_seen == []


def test_layers_that_the_base_does_not_have_are_refused_since_vllm_passes_over_them(one, tmp_path):
    renamed = {name.replace("layers.1.", "layers.7."): value for name, value in fitting().items()}
    files = open_adapter(write(tmp_path / "a", {"r": 2, "target_modules": ["q_proj", "v_proj"]}, renamed))
    with pytest.raises(AdapterMismatchError, match=r"layers\.7"):
        one[0].load("a--1", files)


def test_a_load_counts_only_when_every_replica_has_it_and_is_undone_elsewhere(base, replicas, tmp_path):
    servers = [replicas() for _ in range(3)]
    servers[1].refuse = True
    with connected(base, *servers) as engine:
        with pytest.raises(UnsupportedError, match="expected target modules"):
            engine.load("a--1", adapter(tmp_path / "a"))
        assert [server.adapters for server in servers] == [{}, {}, {}]
        assert list(engine._folder.iterdir()) == []
        with pytest.raises(MissingInputError):
            begin(engine, key="a--1")
        servers[1].refuse = False
        engine.load("a--1", adapter(tmp_path / "a"))
        assert [len(server.adapters) for server in servers] == [1, 1, 1]


def test_a_load_fails_while_a_replica_is_away(base, replicas, tmp_path):
    stays, goes = replicas(), replicas()
    with connected(base, stays, goes) as engine:
        goes.close()
        with pytest.raises(UnreachableError, match=goes.url):
            engine.load("a--1", adapter(tmp_path / "a"))
        assert stays.adapters == {}


def test_no_more_adapters_than_there_is_room_for_and_none_twice(one, tmp_path):
    engine, _ = one
    for n in range(4):
        engine.load(f"a--{n}", adapter(tmp_path / f"a{n}"))
    with pytest.raises(ConflictError):
        engine.load("a--1", adapter(tmp_path / "again"))
    with pytest.raises(BusyError):
        engine.load("b--1", adapter(tmp_path / "b"))
    engine.unload("a--0")
    engine.load("b--1", adapter(tmp_path / "b"))


def test_an_adapter_in_use_is_not_unloaded(one, tmp_path):
    engine, server = one
    engine.load("a--1", adapter(tmp_path / "a"))
    server.gate.clear()
    _, listener = begin(engine, key="a--1")
    with pytest.raises(ConflictError):
        engine.unload("a--1")
    server.gate.set()
    listener.finish()
    engine.unload("a--1")
    assert server.adapters == {}
