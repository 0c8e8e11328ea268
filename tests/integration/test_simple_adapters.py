"""Adapters come into the plain engine and go while it answers: nothing that is said changes, and nothing is left."""

import threading
import time

import pytest

from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    ConflictError,
    LoraTuneError,
    MissingInputError,
)
from tests.integration import test_simple_engine
from tests.integration.test_simple_engine import LIMIT_SECONDS, PROMPTS, Gate, Heard, alone
from tests.tiny import tiny_model

adapters = test_simple_engine.adapters
make_engine = test_simple_engine.make_engine


def test_adapters_come_and_go_and_leave_nothing(make_engine, adapters):
    engine = make_engine(tiny_model("llama"), max_adapters=2)
    (lora, with_lora), (dora, with_dora) = adapters("llama", "lora"), adapters("llama", "dora")
    plain = alone(tiny_model("llama"), PROMPTS[2])
    for _ in range(3):
        engine.load("one", lora)
        with pytest.raises(ConflictError):
            engine.load("one", lora)
        engine.load("one-more", dora)
        with pytest.raises(BusyError):
            engine.load("third", lora)
        for key, model in (("one", with_lora), ("one-more", with_dora)):
            heard = Heard(engine, PROMPTS[2], key)
            heard.finish()
            assert heard.ids == alone(model, PROMPTS[2])
        engine.unload("one-more")
        engine.unload("one")
        with pytest.raises(MissingInputError):
            Heard(engine, PROMPTS[2], "one")
        heard = Heard(engine, PROMPTS[2])
        heard.finish()
        assert heard.ids == plain
        assert (engine.facts().n_adapters, engine.facts().adapter_bytes) == (0, 0)


def test_an_adapter_that_is_used_is_not_unloaded(make_engine, adapters):
    model = tiny_model("llama")
    files, with_adapter = adapters("llama", "lora")
    engine = make_engine(model)
    engine.load("a", files)
    gate = Gate(model)
    heard = Heard(engine, PROMPTS[2], "a")
    assert gate.entered.wait(LIMIT_SECONDS)
    refused = []

    def unload():
        try:
            engine.unload("a")
        except LoraTuneError as err:
            refused.append(err)

    asking = threading.Thread(target=unload)
    asking.start()
    while not engine._chores:
        time.sleep(0.001)
    gate.open.set()
    asking.join(LIMIT_SECONDS)
    assert [type(err) for err in refused] == [ConflictError]
    heard.finish()
    assert heard.ids == alone(with_adapter, PROMPTS[2])
    engine.unload("a")


def test_loading_beside_an_answer_does_not_change_it(make_engine, adapters):
    """Also when the one that is loaded does not fit: the refusal changes nothing."""
    (lora, with_lora), (dora, _), (foreign, _) = adapters("llama", "lora"), adapters("llama", "dora"), adapters("gpt2", "lora")  # fmt: skip
    engine = make_engine(tiny_model("llama"))
    with pytest.raises(AdapterMismatchError):
        engine.load("foreign", foreign)
    engine.load("one", lora)
    loaded = []

    def load_another(heard):
        if len(heard.tokens) == 2:
            # On another thread: an engine's thread that waits for itself would wait for ever.
            for key, files in (("another", dora), ("foreign", foreign)):
                thread = threading.Thread(target=attempt, args=(key, files))
                thread.start()
                loaded.append(thread)

    def attempt(key, files):
        try:
            engine.load(key, files)
        except AdapterMismatchError:
            assert key == "foreign"

    heard = Heard(engine, PROMPTS[2], "one", max_tokens=40, ignore_end=True, on_token=load_another)
    base = Heard(engine, PROMPTS[2], max_tokens=40, ignore_end=True)
    heard.finish(), base.finish()
    for thread in loaded:
        thread.join(LIMIT_SECONDS)
    assert heard.ids == alone(with_lora, PROMPTS[2], 40, ends=())
    assert base.ids == alone(tiny_model("llama"), PROMPTS[2], 40, ends=())
    assert engine.facts().n_adapters == 2
