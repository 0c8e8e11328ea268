"""The plain engine against peft's own generate: every answer is what its adapter says alone, whatever goes on beside it."""

import json
import math
import threading

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.adapter.door import CONFIG, open_adapter
from lora_tune.errors import (
    BusyError,
    DrainingError,
    MissingInputError,
    OutOfMemoryError,
    RequestError,
    TrainingError,
)
from lora_tune.serving.batches import Batch
from lora_tune.serving.engine import BASE, Finish, Sampling, Work
from lora_tune.serving.simple import MAX_BATCH, MAX_RUNNING, SimpleEngine
from tests.tiny import tiny_model

N_TOKENS = 9
PROMPTS = [tuple(range(5, 5 + n)) for n in (1, 3, 11, 11, 24)]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gemma": ["o_proj", "up_proj"],
}
LIMIT_SECONDS = 60


def write_adapter(folder, architecture, *, seed, variant="lora", rank=4, targets=None, size=0.2):
    """Write an adapter whose effect is large, by peft itself."""
    torch.manual_seed(seed)
    settings_ = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets or TARGETS[architecture], use_dora=variant == "dora",
        use_rslora=variant == "rslora", fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model(architecture), settings_)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, size)
    model.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": sorted(config["target_modules"])}))
    return folder


def alone(model, prompt, n_tokens=N_TOKENS, ends=(2,)):
    """Return what transformers' own greedy generate answers to one prompt."""
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=n_tokens, eos_token_id=list(ends), pad_token_id=0,
        )  # fmt: skip
    answer = output[0, len(prompt) :].tolist()
    return answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]


def chances(model, prompt, answer):
    """Return the log-probability of each token of an answer, from one call without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer).reshape(-1, 1)).flatten().tolist()


class Heard:
    """What one answer said."""

    def __init__(self, engine, prompt, adapter=BASE, *, on_token=None, **sampling):
        self.events, self._over, self._on_token = [], threading.Event(), on_token
        work = Work(tuple(prompt), adapter, Sampling(**{"max_tokens": N_TOKENS, **sampling}))
        self.answering = engine.submit(work, self._hear)

    def _hear(self, event):
        assert not self._over.is_set(), "something came after the end"
        self.events.append(event)
        if isinstance(event, Finish):
            self._over.set()
        elif self._on_token is not None:
            self._on_token(self)

    @property
    def tokens(self):
        return [event for event in self.events if not isinstance(event, Finish)]

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    def finish(self):
        assert self._over.wait(LIMIT_SECONDS), "no end came"
        assert self.events[-1].n_generated == len(self.tokens)
        return self.events[-1]


@pytest.fixture
def make_engine():
    engines = []

    def make(model, *, ends=(2,), **options):
        engine = SimpleEngine(model, ends, **{"max_context_tokens": 64, "adapter_dtype": "fp32", **options})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Return a function (architecture, variant, rank) → (files, the same adapter on a model of its own)."""
    made = {}

    def get(architecture="llama", variant="lora", rank=4):
        key = (architecture, variant, rank)
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter")
            write_adapter(folder, architecture, seed=rank, variant=variant, rank=rank)
            made[key] = open_adapter(folder), peft.PeftModel.from_pretrained(tiny_model(architecture), folder).eval()
        return made[key]

    return get


@pytest.mark.parametrize("architecture", TARGETS)
def test_mixed_answers_are_those_of_each_adapter_alone(make_engine, adapters, architecture):
    engine = make_engine(tiny_model(architecture))
    plain = tiny_model(architecture)
    known = {variant: adapters(architecture, variant) for variant in ("lora", "rslora", "dora")}
    for key, (files, _) in known.items():
        engine.load(key, files)
    models = {BASE: plain, **{key: model for key, (_, model) in known.items()}}
    heard = [(key, prompt, Heard(engine, prompt, key, n_logprobs=0)) for prompt in PROMPTS for key in models]
    for key, prompt, answer in heard:
        assert answer.finish().reason in ("length", "stop")
        assert answer.ids == alone(models[key], prompt), (key, prompt)
        expected = chances(models[key], prompt, answer.ids)
        assert [token.logprob for token in answer.tokens] == pytest.approx(expected, abs=1e-4)
    first = [round(answer.tokens[0].logprob, 3) for _, prompt, answer in heard if prompt == PROMPTS[2]]
    assert len(set(first)) == 4, "an adapter did nothing"
    facts = engine.facts()
    assert (facts.n_running, facts.n_waiting, facts.n_adapters, facts.cache_bytes) == (0, 0, 3, 0)
    assert facts.n_tokens_generated == sum(len(answer.ids) for *_, answer in heard)
    assert facts.n_tokens_prefilled == sum(len(prompt) for _, prompt, _ in heard)
    shapes = [info.shape for files, _ in known.values() for info in files.tensors.values()]
    assert facts.adapter_bytes == 4 * sum(map(math.prod, shapes))


def recurrent(name):
    wide = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    if name == "mamba":
        return hf.MambaForCausalLM(hf.MambaConfig(**wide, state_size=8)).eval()
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(
        **wide, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        max_position_embeddings=128,
    )).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_models_with_a_running_state_answer_as_each_prompt_alone(make_engine, name):
    engine = make_engine(recurrent(name))
    plain = recurrent(name)
    heard = [(prompt, Heard(engine, prompt)) for prompt in PROMPTS * 2]
    for prompt, answer in heard:
        answer.finish()
        assert answer.ids == alone(plain, prompt)


@settings(max_examples=15, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.lists(st.integers(0, 511), min_size=1, max_size=20),
            st.sampled_from([BASE, "a", "b"]),
            st.integers(1, 12),
            st.sampled_from([0.0, 0.8]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_answer_depends_on_what_goes_on_beside_it(shared, asked):
    engine, models = shared
    heard = [Heard(engine, prompt, key, max_tokens=n, temperature=heat, seed=7) for prompt, key, n, heat in asked]
    for (prompt, key, n, heat), answer in zip(asked, heard, strict=True):
        answer.finish()
        if heat:
            again = Heard(engine, prompt, key, max_tokens=n, temperature=heat, seed=7)
            again.finish()
            assert answer.ids == again.ids
        else:
            assert answer.ids == alone(models[key], prompt, n)


@pytest.fixture(scope="module")
def shared(adapters):
    engine = SimpleEngine(tiny_model("llama"), (2,), max_context_tokens=64)
    known = {"a": adapters("llama", "lora"), "b": adapters("llama", "dora")}
    for key, (files, _) in known.items():
        engine.load(key, files)
    yield engine, {BASE: tiny_model("llama"), **{key: model for key, (_, model) in known.items()}}
    engine.close()


def test_an_answer_ends_at_its_end_its_length_or_the_context(make_engine):
    plain = tiny_model("llama")
    answer = alone(plain, PROMPTS[2], 12, ends=())
    engine = make_engine(tiny_model("llama"), ends=(answer[4],), max_context_tokens=len(PROMPTS[2]) + 10)
    until = answer.index(answer[4])
    stopped = Heard(engine, PROMPTS[2], max_tokens=12)
    assert (stopped.finish().reason, stopped.ids) == ("stop", answer[:until])
    ignored = Heard(engine, PROMPTS[2], max_tokens=7, ignore_end=True)
    assert (ignored.finish().reason, ignored.ids) == ("length", answer[:7])
    filled = Heard(engine, PROMPTS[2], max_tokens=12, ignore_end=True)
    assert (filled.finish().reason, filled.ids) == ("length", answer[:10])


def test_logprobs_are_the_models_own(make_engine, adapters):
    files, model = adapters("llama", "dora")
    engine = make_engine(tiny_model("llama"))
    engine.load("a", files)
    heard = Heard(engine, PROMPTS[2], "a", n_logprobs=3, temperature=1.5, top_p=0.7, seed=1)
    heard.finish()
    with torch.no_grad():
        ids = torch.tensor([[*PROMPTS[2], *heard.ids]])
        expected = model(ids, use_cache=False).logits[0, len(PROMPTS[2]) - 1 :].log_softmax(-1)
    for place, token in enumerate(heard.tokens):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        values, likeliest = expected[place].topk(3)
        assert [id for id, _ in token.top] == likeliest.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_cancelling_ends_an_answer_within_a_token_and_leaves_the_others(make_engine):
    engine = make_engine(tiny_model("llama"))
    going = Heard(engine, PROMPTS[2], max_tokens=30, ignore_end=True)
    counts = []

    def cancel_at_three(heard):
        if len(heard.tokens) == 3:
            heard.answering.cancel()
            counts.append(len(heard.tokens))

    for prompt in PROMPTS:
        heard = Heard(engine, prompt, max_tokens=40, ignore_end=True, on_token=cancel_at_three)
        assert heard.finish().reason == "cancelled"
        assert len(heard.tokens) <= counts[-1] + 1
        heard.answering.cancel()
    assert going.finish().reason == "length"
    assert going.ids == alone(tiny_model("llama"), PROMPTS[2], 30, ends=())
    assert engine.facts().n_running == 0


class Gate:
    """Holds the model's thread before each forward pass until it is opened."""

    def __init__(self, model):
        self.open = threading.Event()
        self.entered = threading.Event()
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.entered.set()
        assert self.open.wait(LIMIT_SECONDS)


def test_too_many_waiting_are_refused_and_waiting_ones_can_be_cancelled(make_engine):
    model = tiny_model("llama")
    gate = Gate(model)
    engine = make_engine(model, max_waiting=4)
    first = Heard(engine, PROMPTS[0])
    assert gate.entered.wait(LIMIT_SECONDS)
    waiting = [Heard(engine, PROMPTS[0]) for _ in range(4)]
    with pytest.raises(BusyError):
        Heard(engine, PROMPTS[0])
    waiting[1].answering.cancel()
    assert engine.facts().n_waiting == 4
    gate.open.set()
    assert waiting[1].finish() == Finish("cancelled")
    assert {answer.finish().reason for answer in (first, waiting[0], *waiting[2:])} == {"length"}


def test_more_answers_than_places_all_come(make_engine):
    engine = make_engine(tiny_model("llama"))
    expected = alone(tiny_model("llama"), PROMPTS[1])
    heard = [Heard(engine, PROMPTS[1]) for _ in range(MAX_RUNNING + MAX_BATCH + 1)]
    for answer in heard:
        answer.finish()
        assert answer.ids == expected


def test_what_cannot_be_answered_is_refused_at_once(make_engine):
    engine = make_engine(tiny_model("llama"), max_context_tokens=8)
    for prompt in ((), tuple(range(8)), (512,), (-1,)):
        with pytest.raises(RequestError):
            Heard(engine, prompt)
    with pytest.raises(RequestError):
        Heard(engine, (5,), max_tokens=0)
    with pytest.raises(MissingInputError):
        Heard(engine, (5,), "nobody")


def test_a_failing_forward_pass_fails_its_answers_and_no_others(make_engine):
    model = tiny_model("llama")
    engine = make_engine(model)
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    finish = Heard(engine, PROMPTS[0]).finish()
    assert finish.reason == "failed"
    assert "broken" in finish.error.message
    handle.remove()
    with torch.no_grad():
        weight = model.lm_head.weight[7]
        kept = weight.clone()
        weight.fill_(float("nan"))
    assert isinstance(Heard(engine, PROMPTS[0]).finish().error, TrainingError)
    with torch.no_grad():
        weight.copy_(kept)
    heard = Heard(engine, PROMPTS[0])
    assert heard.finish().reason == "length"
    assert heard.ids == alone(tiny_model("llama"), PROMPTS[0])


def test_closing_ends_every_answer_and_the_thread(make_engine, adapters):
    model = tiny_model("llama")
    gate = Gate(model)
    engine = make_engine(model)
    heard = [Heard(engine, prompt, max_tokens=40, ignore_end=True) for prompt in PROMPTS * 5]
    assert gate.entered.wait(LIMIT_SECONDS)
    threading.Timer(0.05, gate.open.set).start()
    engine.close()
    assert {answer.finish().reason for answer in heard} == {"cancelled"}
    assert not engine._thread.is_alive()
    with pytest.raises(DrainingError):
        Heard(engine, PROMPTS[0])
    with pytest.raises(DrainingError):
        engine.load("a", adapters()[0])
    engine.close()


def test_a_cache_that_does_not_fit_ends_its_answers_and_no_others(make_engine, monkeypatch):
    engine = make_engine(tiny_model("llama"))
    monkeypatch.setattr(Batch, "go_on", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    finish = Heard(engine, PROMPTS[2]).finish()
    assert (finish.reason, type(finish.error)) == ("failed", OutOfMemoryError)
    monkeypatch.undo()
    assert Heard(engine, PROMPTS[2]).finish().reason in ("length", "stop")


def test_an_engine_whose_thread_has_ended_tells_everybody_and_takes_nothing(make_engine, adapters, monkeypatch):
    model = tiny_model("llama")
    gate = Gate(model)
    engine = make_engine(model)
    heard = [Heard(engine, prompt) for prompt in PROMPTS]
    assert gate.entered.wait(LIMIT_SECONDS)
    monkeypatch.setattr(engine, "_await_work", lambda: (_ for _ in ()).throw(RuntimeError("a defect")))
    gate.open.set()
    assert {answer.finish().reason for answer in heard} == {"failed"}
    for act in (lambda: Heard(engine, PROMPTS[0]), lambda: engine.load("a", adapters()[0])):
        with pytest.raises(DrainingError, match="stopped"):
            act()
