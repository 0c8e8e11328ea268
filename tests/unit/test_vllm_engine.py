"""The vllm engine against a server that speaks vLLM's routes as the real one was seen to (tests/vllm_stand_in.py says what)."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    ConflictError,
    DrainingError,
    MissingInputError,
    RequestError,
    UnreachableError,
    UnsupportedError,
)
from lora_tune.model.dense import BaseFiles
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving import vllm_child
from lora_tune.serving.engine import BASE, Finish, Sampling, ServedBase, Token, Work
from lora_tune.serving.vllm import connect_vllm, start_vllm
from lora_tune.serving.vllm_child import ChildLimits, VllmInstall, child_environment, find_vllm, serve_command
from lora_tune.serving.vllm_replica import read_piece
from tests.hostile import fitting
from tests.unit.test_door import write
from tests.vllm_stand_in import MAX_CONTEXT, VllmStandIn, answer_of, logprobs, next_token, until

LIMITS = ChildLimits(max_adapters=4, max_rank=16, max_running=4)
PROMPT = (5, 6, 7)
STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


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
    finish = ask(one[0], (1, 10**6)).finish()
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


# --- adapters


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


# --- replicas


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
    monkeypatch.setattr("lora_tune.serving.vllm._MAX_WAITING", 2)
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
        server.close()
        assert isinstance(ask(engine, key="a--1").finish().error, UnreachableError)
        again = replicas(port=server.port)
        assert until(lambda: ask(engine, key="a--1").finish().reason != "failed")
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


# --- a vLLM of our own


@pytest.fixture
def install(tmp_path):
    """A python that says which vLLM it has, and serves as the stand-in does."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n*importlib.metadata*) echo 0.32.0+cpu;;\n'
        f'*) cd {STAND_IN.parents[1]} && exec {sys.executable} -m tests.vllm_stand_in "$@";;\nesac\n'
    )
    python.chmod(0o755)
    return {"LORA_TUNE_VLLM_PYTHON": str(python), "PATH": os.environ["PATH"]}


def processes_of(folder):
    """Ids of processes whose command speaks of the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_vllm_of_our_own_is_started_used_and_ended(base, install, tmp_path):
    engine = start_vllm(base, LIMITS, ignore, install)
    folder = engine._child.folder
    try:
        assert folder.stat().st_mode & 0o077 == 0
        engine.load("a--1", adapter(tmp_path / "a"))
        assert ask(engine, key="a--1").finish().reason != "failed"
        assert len(processes_of(folder)) == 2
    finally:
        engine.close()
    assert not folder.exists()
    assert processes_of(folder) == []


def test_a_vllm_that_dies_amid_an_answer_fails_it_and_what_comes_after(base, install):
    engine = start_vllm(base, LIMITS, ignore, install)
    try:
        _, listener = begin(engine, max_tokens=40, ignore_end=True)
        assert until(lambda: len(listener.tokens) >= 2)
        (server,) = [pid for pid in processes_of(engine._child.folder) if pid != engine._child._keeper.pid]
        os.kill(server, signal.SIGKILL)
        assert isinstance(listener.finish().error, UnreachableError)
        assert until(lambda: "has ended" in str(ask(engine).finish().error))
    finally:
        engine.close()
    assert processes_of(engine._child.folder) == []


def test_a_vllm_that_does_not_start_is_told_with_its_reason(base, install, monkeypatch):
    made = []
    monkeypatch.setattr(
        vllm_child, "_private_folder", lambda make=vllm_child._private_folder: made.append(make()) or made[-1]
    )
    with pytest.raises(UnreachableError, match="Engine core initialization failed"):
        start_vllm(base, LIMITS, ignore, install | {"LORA_TUNE_VLLM_ARGS": "--fail"})
    assert not made[0].exists()


def test_a_vllm_does_not_outlive_us_however_we_end(base, install, tmp_path):
    program = tmp_path / "owner.py"
    program.write_text(
        "import os, sys, time\n"
        "from tests.unit.test_vllm_engine import LIMITS, ignore, install\n"
        "from lora_tune.serving.vllm_child import VllmChild, find_vllm\n"
        "from types import SimpleNamespace as N\n"
        "from pathlib import Path\n"
        "base = N(section=N(quantization='none', dtype='fp32'), files=N(folder=Path('.')), max_context_tokens=64)\n"
        f"env = {install!r}\n"
        "child = VllmChild(find_vllm(env), base, LIMITS, env)\n"
        "child.wait_until_up(ignore)\n"
        "print(child.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, cwd=STAND_IN.parents[1],
                             env=os.environ | {"PYTHONPATH": str(STAND_IN.parents[1])})  # fmt: skip
    with owner:
        folder = owner.stdout.readline().strip()
        assert Path(folder, "socket").exists()
        assert len(processes_of(folder)) == 2
        owner.send_signal(signal.SIGKILL)
    assert until(lambda: processes_of(folder) == [] and not Path(folder).exists())


def test_a_missing_vllm_is_said_with_how_to_get_it(tmp_path):
    environment = {"PATH": str(tmp_path)}
    for named in ({}, {"LORA_TUNE_VLLM_PYTHON": str(tmp_path / "nothing")}):
        with pytest.raises(UnreachableError) as caught:
            find_vllm(environment | named)
        assert "pip install vllm" in caught.value.hint
        assert caught.value.exit_code == 69


def test_the_command_serves_the_base_as_it_was_asked(base):
    install = VllmInstall(Path("/v/bin/python"), "0.32.0")
    command = serve_command(
        install, base, ChildLimits(20, 20, 8), socket=Path("/s"), more=["--tensor-parallel-size", "4"]
    )
    flags = dict(pairwise(command))
    assert flags["serve"] == str(base.files.folder)
    assert {"--max-lora-rank": "32", "--max-loras": "8", "--max-cpu-loras": "20", "--max-num-seqs": "8", "--dtype": "float32",
            "--max-model-len": "48", "--generation-config": "vllm", "--tensor-parallel-size": "4"}.items() <= flags.items()  # fmt: skip
    assert "--enforce-eager" not in command
    assert "--enforce-eager" in serve_command(replace(install, version="0.32.0+cpu"), base, LIMITS, socket=Path("/s"))
    for change, limits in (({"quantization": "int8"}, LIMITS), ({}, replace(LIMITS, max_rank=513))):
        asked = replace(base, section=base.section.model_copy(update=change))
        with pytest.raises(UnsupportedError):
            serve_command(install, asked, limits, socket=Path("/s"))


def test_the_child_sees_no_keys_of_ours(base):
    given = {
        "LORA_TUNE_API_KEY": "a",
        "LORA_TUNE_ADMIN_KEY": "b",
        "HF_TOKEN": "c",
        "VLLM_LORA_RESOLVER_CACHE_DIR": "d",
        "PATH": "p",
    }
    seen = child_environment(given, "own")
    assert (seen["PATH"], seen["VLLM_API_KEY"], seen["HF_HUB_OFFLINE"]) == ("p", "own", "1")
    assert not set(seen.values()) & {"a", "b", "c", "d"}
