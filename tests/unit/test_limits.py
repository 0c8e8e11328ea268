"""What an engine takes on: each bound at its edge, and that every engine asks the same place."""

from pathlib import Path

import pytest

from lora_tune.errors import BusyError, ConflictError, MissingInputError, RequestError
from lora_tune.serving.engine import BASE, Sampling, Work
from lora_tune.serving.limits import EngineLimits

LIMITS = EngineLimits(max_context_tokens=8, n_vocabulary=10, max_waiting=2, max_adapters=2)
SERVING = Path(__file__).resolve().parents[2] / "lora_tune" / "serving"


def work(prompt, n_tokens=1, adapter=BASE):
    return Work(tuple(prompt), adapter, Sampling(n_tokens))


@pytest.mark.parametrize("prompt", [[], range(8), [10], [-1], [1, 10]])
def test_a_prompt_that_cannot_be_read_is_refused(prompt):
    with pytest.raises(RequestError):
        LIMITS.check_work(work(prompt))


def test_what_just_fits_is_taken_and_its_answer_ends_where_the_context_does():
    LIMITS.check_work(work(range(7)))
    LIMITS.check_work(work([0, 9]))
    assert LIMITS.room_tokens(work(range(7), 5)) == 1
    assert LIMITS.room_tokens(work([1], 5)) == 5
    with pytest.raises(RequestError):
        LIMITS.check_work(work([1], 0))


def test_an_answer_waits_only_where_there_is_room_and_for_an_adapter_that_is_there():
    LIMITS.check_place(work([1]), held=(), n_waiting=1)
    LIMITS.check_place(work([1], adapter="a"), held={"a"}, n_waiting=0)
    with pytest.raises(BusyError):
        LIMITS.check_place(work([1]), held=(), n_waiting=2)
    with pytest.raises(MissingInputError):
        LIMITS.check_place(work([1], adapter="a"), held={"b"}, n_waiting=0)


def test_an_adapter_comes_in_once_and_where_there_is_a_place():
    LIMITS.check_arrival("a", held={"b"})
    for held, arriving, error in (({"a"}, (), ConflictError), ((), {"a"}, ConflictError), ({"b"}, {"c"}, BusyError)):
        with pytest.raises(error):
            LIMITS.check_arrival("a", held=held, arriving=arriving)


def test_no_engine_has_bounds_of_its_own():
    for engine in ("native", "simple", "vllm"):
        text = (SERVING / f"{engine}.py").read_text(encoding="utf-8")
        assert "BusyError(" not in text
        assert "RequestError(" not in text
