"""Golden probes through an engine: the same verdicts as a replay of logits gives, from answers and their likeliest tokens."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.manifest import Probe
from lora_tune.adapter.probes import CLOSE_KL, EQUAL_DELTA, ProbeResult
from lora_tune.adapter.probes import _kl as replayed_kl
from lora_tune.errors import AdapterError, BusyError, DrainingError, RequestError, UsageError
from lora_tune.serving import probing
from lora_tune.serving.engine import MAX_LOGPROBS, Token
from lora_tune.serving.probing import compare, probe
from tests.fleets import adapter, bare_base, served, with_passport
from tests.scripted_engine import ScriptedEngine, recorded_probe

WIDTH = 16


@st.composite
def logits(draw, size=30):
    return [draw(st.floats(-8, 8, allow_nan=False, width=32)) for _ in range(size)]


def log_softmax(values):
    top = max(values)
    norm = top + math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - norm for value in values]


def likeliest(logprobs, count):
    order = sorted(range(len(logprobs)), key=lambda id: (-logprobs[id], id))
    return [(id, logprobs[id]) for id in order[:count]]


def one_probe(trained, base):
    """A probe of as many positions as there are rows."""
    tops = [likeliest(row, WIDTH) for row in trained]
    return Probe(
        prompt="x", input_ids=(1, 2, *(top[0][0] for top in tops)), answer_start=2,
        top_ids=tuple(tuple(id for id, _ in top) for top in tops),
        top_logprobs=tuple(tuple(value for _, value in top) for top in tops),
        base_logprobs=tuple(tuple(row[id] for id, _ in top) for row, top in zip(base, tops, strict=True)),
    )  # fmt: skip


def tokens(rows):
    return [Token(likeliest(row, 1)[0][0], logprob=max(row), top=tuple(likeliest(row, MAX_LOGPROBS))) for row in rows]


rows = st.lists(logits().map(log_softmax), min_size=1, max_size=4)


@settings(max_examples=40)
@given(rows)
def test_the_same_answers_are_equal_and_agree(trained):
    result = compare([one_probe(trained, trained)], [tokens(trained)])
    assert result == ProbeResult("equal", 0.0, pytest.approx(0, abs=1e-9), 1.0, pytest.approx(0, abs=1e-9))


@given(logits().map(log_softmax), logits().map(log_softmax))
def test_at_one_position_the_divergence_is_that_of_a_replay_over_all_logits(trained, live):
    import torch

    ids = [id for id, _ in likeliest(trained, WIDTH)]
    recorded, found = [trained[id] for id in ids], [live[id] for id in ids]
    expected = replayed_kl(torch.tensor([recorded]), torch.tensor([found]))[0]
    assert probing._kl(recorded, found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=40)
@given(rows, rows)
def test_an_answer_is_compared_up_to_the_first_other_token_and_no_further(trained, others):
    count = min(len(trained), len(others))
    trained, others = trained[:count], others[:count]
    one = one_probe(trained, others)
    answer = tokens(others)
    expected = one.input_ids[one.answer_start :]
    first = next((n for n, token in enumerate(answer) if token.id != expected[n]), count - 1)
    whole = compare([one], [answer])
    cut = compare([one], [answer[: first + 1]])
    assert whole == cut
    changed = answer[: first + 1] + [Token(39, -9.0, ((39, -9.0),))] * (count - first - 1)
    assert compare([one], [changed]) == whole


@settings(max_examples=40)
@given(rows, st.floats(-EQUAL_DELTA / 4, EQUAL_DELTA / 4))
def test_rounding_is_equal(trained, shift):
    live = [[value + shift for value in row] for row in trained]
    assert compare([one_probe(trained, live)], [tokens(live)]).verdict == "equal"


def peaked(token, share=0.9, size=40):
    return [math.log(share if id == token else (1 - share) / (size - 1)) for id in range(size)]


def test_the_base_in_the_adapters_place_is_different():
    trained, base = [peaked(3), peaked(4)], [peaked(7), peaked(8)]
    result = compare([one_probe(trained, base)], [tokens(base)])
    assert result.verdict == "different"
    assert result.top1_agreement == 0.0
    assert result.kl > 1


def test_the_base_is_different_also_when_none_of_its_likeliest_tokens_was_recorded():
    trained = [[math.log(1 / 16) - 1e-3 * id if id < 16 else -30.0 for id in range(40)]]
    live = [[-30.0 if id < 16 else math.log(1 / 24) - 1e-3 * id for id in range(40)]]
    result = compare([one_probe(trained, live)], [tokens(live)])
    assert result.verdict == "different"


def test_an_adapter_with_a_small_effect_is_not_close_to_its_base():
    trained, base = [peaked(3, 0.90)], [peaked(3, 0.86)]
    result = compare([one_probe(trained, base)], [tokens(base)])
    assert result.kl < CLOSE_KL
    assert result.verdict == "different"


def test_another_dtype_is_close():
    trained, base, live = [peaked(3, 0.90)], [peaked(9, 0.90)], [peaked(3, 0.895)]
    assert compare([one_probe(trained, base)], [tokens(live)]).verdict == "close"


@pytest.mark.parametrize(
    "answers", [[[]], [[Token(3)]], [[Token(3, math.nan, ((3, math.nan),))]]], ids=["none", "bare", "nan"]
)
def test_an_engine_that_says_nothing_comparable_is_different(answers):
    assert compare([one_probe([peaked(3)], [peaked(4)])], answers).verdict == "different"


def test_one_number_that_is_none_among_many_good_ones_is_different():
    trained = [peaked(3), peaked(5)]
    answer = tokens(trained)
    spoiled = Token(5, math.nan, tuple((id, math.nan if id == 5 else value) for id, value in answer[1].top))
    assert compare([one_probe(trained, [peaked(7), peaked(8)])], [[answer[0], spoiled]]).verdict == "different"


@pytest.fixture
def base(tmp_path):
    return bare_base(tmp_path / "base")


@pytest.fixture(scope="module")
def passported(tiny_bases, tmp_path_factory):
    """Return a base and an adapter on it with a passport of three probes."""
    folder = tiny_bases("llama")
    files = open_adapter(with_passport(adapter(tmp_path_factory.mktemp("p") / "a", 5), folder, probes=3))
    return served(folder), files


@pytest.fixture
def engine(passported):
    made = ScriptedEngine()
    made.load("k", passported[1])
    yield made
    made.close()


def test_an_engine_that_answers_as_recorded_is_equal_and_lets_the_adapter_go(passported, engine):
    result = probe(engine, passported[0], "k", passported[1])
    assert (result.verdict, result.top1_agreement) == ("equal", 1.0)
    engine.unload("k")


def test_an_engine_that_is_deaf_to_the_adapter_is_different(passported, engine):
    engine.deaf = {"k"}
    assert probe(engine, passported[0], "k", passported[1]).verdict == "different"


def test_without_a_passport_there_is_nothing_to_compare(base, tmp_path, engine):
    with pytest.raises(UsageError):
        probe(engine, base, "k", open_adapter(adapter(tmp_path / "a", 1)))


def test_tokens_that_the_base_has_no_row_for_never_reach_the_engine(passported, engine):
    where, files = passported
    manifest = files.manifest
    bad = manifest.probes[1].model_copy(update={"input_ids": (512, *manifest.probes[1].input_ids[1:])})
    changed = replace(files, manifest=manifest.model_copy(update={"probes": (manifest.probes[0], bad)}))
    with pytest.raises(AdapterError, match="probe 1 holds token 512, but the base knows 512"):
        probe(engine, where, "k", changed)
    assert engine.facts().n_tokens_prefilled == 0


def test_a_busy_engine_is_waited_for_and_in_the_end_said_to_be_busy(passported, engine, monkeypatch):
    monkeypatch.setattr(probing, "MAX_SECONDS", 0.2)
    engine.max_waiting = 0
    with pytest.raises(BusyError):
        probe(engine, passported[0], "k", passported[1])
    engine.max_waiting = 1
    engine.pause()
    with pytest.raises(BusyError):
        probe(engine, passported[0], "k", passported[1])
    engine.resume()
    monkeypatch.undo()
    assert probe(engine, passported[0], "k", passported[1]).verdict == "equal"


@pytest.mark.parametrize("error", [DrainingError("closing"), RequestError("defect")])
def test_an_answer_that_fails_is_told_in_the_engines_words_and_the_others_are_cancelled(passported, engine, error):
    engine.token_error = error
    with pytest.raises(type(error), match=error.message):
        probe(engine, passported[0], "k", passported[1])


def test_a_passports_author_does_not_decide_how_long_a_server_computes(passported, tiny_bases, tmp_path, engine):
    where, files = passported
    long = recorded_probe("x", range(5, 9), "long", n_tokens=400)
    changed = replace(files, manifest=files.manifest.model_copy(update={"probes": (long,) * 16}))
    probe(engine, where, "k", changed)
    assert engine.facts().n_tokens_generated <= 16 * probing._MAX_POSITIONS


def test_a_probe_whose_numbers_are_not_finite_is_different_wherever_it_stands(monkeypatch):
    import torch

    from lora_tune.adapter import probes as direct

    recorded = [recorded_probe("a", range(5, 15 + n), f"prompt {n}") for n in range(2)]
    for broken in (0, 1):

        def logprobs(_, ids, start, bad=recorded[broken].input_ids):
            one = next(p for p in recorded if p.input_ids == tuple(ids))
            table = torch.full((len(one.top_ids), 512), float("nan") if one.input_ids == bad else -30.0)
            if one.input_ids != bad:
                table.scatter_(1, torch.tensor(one.top_ids), torch.tensor(one.top_logprobs))
            return table

        monkeypatch.setattr(direct, "answer_logprobs", logprobs)
        assert direct.replay_probes(None, recorded).verdict == "different"
