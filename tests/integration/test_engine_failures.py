"""What fails in an engine fails alone: memory that is not there, and a thread that has ended."""

import threading

import pytest
import torch

from lora_tune.errors import DrainingError, LoraTuneError, OutOfMemoryError
from lora_tune.serving.cache import KeyValueRows
from lora_tune.serving.native import NativeEngine
from lora_tune.serving.simple import SimpleEngine
from tests.engines import ask, peft_answers
from tests.tiny import tiny_model

SHORT, LONG = list(range(5, 25)), list(range(5, 205))


@pytest.fixture
def engine():
    opened = NativeEngine(tiny_model("llama"), [2], max_context_tokens=400, max_running=4, prefix_bytes=0)
    yield opened
    opened.close()


def no_more_than(monkeypatch, most_tokens):
    """As if there were no memory for longer rows."""
    longer = KeyValueRows._longer

    def bounded(self, tensor, n_tokens):
        if n_tokens > most_tokens:
            raise OutOfMemoryError("no memory for keys and values")
        return longer(self, tensor, n_tokens)

    monkeypatch.setattr(KeyValueRows, "_longer", bounded)


class First:
    """Told the first token of an answer."""

    def __init__(self, engine, prompt, **how):
        self.came = threading.Event()
        self.answer = ask(engine, prompt, **how)
        assert self.answer.events is not None

    def begun(self):
        while self.answer.events.empty():
            threading.Event().wait(0.001)
        return self.answer


def test_a_prompt_for_which_there_is_no_memory_fails_alone(engine, monkeypatch, tiny_bases):
    alone = peft_answers(tiny_bases("llama"), None, [SHORT], 60)[0]
    no_more_than(monkeypatch, 128)
    going = [First(engine, SHORT, max_tokens=60) for _ in range(2)]
    begun = [one.begun() for one in going]
    too_long = ask(engine, LONG).wait()
    assert (too_long.finish.reason, type(too_long.finish.error)) == ("failed", OutOfMemoryError)
    assert [answer.wait().ids for answer in begun] == [alone, alone]
    monkeypatch.undo()
    assert ask(engine, LONG).wait().ids == peft_answers(tiny_bases("llama"), None, [LONG], 12)[0]


def test_an_answer_that_outgrows_the_memory_fails_alone(engine, monkeypatch, tiny_bases):
    no_more_than(monkeypatch, 128)
    grows = ask(engine, LONG[:120], max_tokens=40)
    stays = [ask(engine, SHORT, max_tokens=60) for _ in range(3)]
    assert isinstance(grows.wait().finish.error, OutOfMemoryError)
    assert grows.ids == peft_answers(tiny_bases("llama"), None, [LONG[:120]], 40)[0][: len(grows.ids)]
    assert grows.finish.n_generated == len(grows.ids) >= 8
    alone = peft_answers(tiny_bases("llama"), None, [SHORT], 60)[0]
    assert [answer.wait().ids for answer in stays] == [alone] * 3


def test_less_room_is_taken_where_there_is_no_memory_for_ample_room(monkeypatch):
    rows = KeyValueRows(1, 2)
    rows.reserve(1280)
    rows.keys[0] = rows._empty(torch.zeros(1, 1, 1, 2))
    rows.keys[0][:, :, :1280] = 7.0
    no_more_than(monkeypatch, 1408)
    rows.reserve(1281)
    assert rows.n_tokens == 1408
    assert rows.keys[0][:, :, :1280].eq(7.0).all()
    with pytest.raises(OutOfMemoryError):
        rows.reserve(1409)
    assert (rows.n_tokens, rows.keys[0].shape[2]) == (1408, 1409)


def test_a_forward_pass_that_fails_on_a_prompt_fails_that_prompt_alone(tiny_bases):
    model = tiny_model("llama")
    opened = NativeEngine(model, [2], max_context_tokens=400, max_running=4, prefix_bytes=0)

    def refuse_wide(_module, _args, given):
        if given["input_ids"].shape[1] > 30:
            raise RuntimeError("too wide")

    model.register_forward_pre_hook(refuse_wide, with_kwargs=True)
    going = First(opened, SHORT, max_tokens=100).begun()
    broken = ask(opened, LONG[:100]).wait()
    assert broken.finish.reason == "failed"
    assert going.wait().ids == peft_answers(tiny_bases("llama"), None, [SHORT], 100)[0]
    opened.close()


@pytest.mark.parametrize("kind", [NativeEngine, SimpleEngine])
def test_an_engine_whose_thread_has_ended_tells_everybody_and_answers_no_more(kind, monkeypatch):
    opened = kind(tiny_model("llama"), [2], max_context_tokens=400)
    assert opened.can_answer()
    answers = [ask(opened, SHORT, max_tokens=380) for _ in range(3)]
    monkeypatch.setattr(opened, "_await_work", lambda: (_ for _ in ()).throw(RuntimeError("a defect")))
    for answer in answers:
        finish = answer.wait().finish
        assert finish.reason == "failed"
        assert isinstance(finish.error, LoraTuneError)
    opened._thread.join(10)
    assert not opened.can_answer()
    for act in (lambda: ask(opened, SHORT), lambda: opened.unload("a")):
        with pytest.raises(DrainingError, match="stopped"):
            act()
    opened.close()


@pytest.mark.parametrize("kind", [NativeEngine, SimpleEngine])
def test_an_engine_that_is_closed_answers_no_more(kind):
    opened = kind(tiny_model("llama"), [2], max_context_tokens=64)
    opened.close()
    assert not opened.can_answer()
