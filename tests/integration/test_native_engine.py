"""The native engine against PEFT: mixed batches answer as each adapter does alone, token for token."""

import random
import threading
import time

import pytest
import torch
import transformers as hf

from lora_tune.errors import (
    AdapterMismatchError,
    BusyError,
    ConflictError,
    DrainingError,
    MissingInputError,
    RequestError,
    UnsupportedError,
)
from lora_tune.model.dense import ready_base
from lora_tune.model.load import load_base
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import BASE
from lora_tune.serving.forward import unsupported
from lora_tune.serving.native import NativeEngine
from tests.engines import ask, open_written, peft_answers, write_adapter
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


def _prompts(count, *, seed=0, longest=40, vocabulary=400):
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def _engine(model, **settings):
    return NativeEngine(model, [2], max_context_tokens=256, **settings)


def _files(base):
    return ready_base(BaseSection(name=str(base)), lambda *_: None)


def _odd(kind):
    """Models whose masks are not the plain causal one."""
    wide = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    configs = {
        "sliding mistral": lambda: hf.MistralConfig(**wide, num_hidden_layers=2, sliding_window=8),
        "mixed gemma3": lambda: hf.Gemma3TextConfig(**wide, num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2),
        "softcapped gemma2": lambda: hf.Gemma2Config(**wide, num_hidden_layers=2, sliding_window=8, attn_implementation="eager"),
        "granite": lambda: hf.GraniteConfig(**{k: v for k, v in wide.items() if k != "head_dim"}, num_hidden_layers=2, logits_scaling=4.0, attention_multiplier=0.25, residual_multiplier=0.5, embedding_multiplier=3.0),
    }  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.fixture
def base_of(tmp_path, tiny_bases):
    """Return a function kind → folder of a base."""

    def base(kind):
        if kind in ARCHITECTURES:
            return tiny_bases(kind)
        folder = tmp_path / "base"
        _odd(kind).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return base


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "sliding mistral", "mixed gemma3", "softcapped gemma2", "granite"])
def test_mixed_batches_answer_as_each_adapter_alone(tmp_path, base_of, kind):
    base = base_of(kind)
    files = {f"a{n}": open_written(tmp_path / f"a{n}", base, seed=n, rank=(2, 4, 3)[n]) for n in range(3)}
    more = {"attn_implementation": "eager"} if kind == "softcapped gemma2" else {}
    model = hf.AutoModelForCausalLM.from_pretrained(base, **more).eval()
    engine = _engine(model, max_running=6)
    for key, adapter in files.items():
        engine.load(key, adapter)
    prompts = _prompts(20)
    keys = [(BASE, "a0", "a1", "a2")[n % 4] for n in range(20)]
    lengths = [3 + n % 11 for n in range(20)]  # answers leave and join at different steps
    begun = [ask(engine, p, k, max_tokens=n) for p, k, n in zip(prompts, keys, lengths, strict=True)]
    found = [answer.wait().ids for answer in begun]
    engine.close()
    for key in (BASE, *files):
        mine = [n for n in range(20) if keys[n] == key]
        alone = peft_answers(base, None if key == BASE else files[key].folder, [prompts[n] for n in mine], 13, **more)
        assert [found[n] for n in mine] == [answer[: lengths[n]] for n, answer in zip(mine, alone, strict=True)], key
    changed = {key: [found[n] for n in range(20) if keys[n] == key] for key in (BASE, *files)}
    assert len({str(answers) for answers in changed.values()}) == 4


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_quantized_base_answers_as_peft_does_on_it(tmp_path, tiny_bases, quantization, architecture):
    from lora_tune.adapter.apply import attach_adapter
    from tests.greedy_oracle import greedy

    base = tiny_bases(architecture)
    files = [open_written(tmp_path / f"a{n}", base, seed=n) for n in range(2)]
    section = BaseSection(name=str(base), quantization=quantization, dtype="fp32")
    engine = _engine(load_base(_files(base), section))
    for n in range(2):
        engine.load(f"a{n}", files[n])
    prompts = _prompts(8, seed=3)
    begun = [ask(engine, prompt, (BASE, "a0", "a1")[n % 3]) for n, prompt in enumerate(prompts)]
    found = [answer.wait().ids for answer in begun]
    engine.close()
    for n, prompt in enumerate(prompts):
        plain = load_base(_files(base), section)
        if n % 3:
            plain = attach_adapter(plain, files[n % 3 - 1], name="default", adapter_dtype="fp32")
        assert found[n] == greedy(plain, prompt, 12)


def test_the_same_prompt_again_reuses_only_its_own_adapters_beginning(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = [open_written(tmp_path / f"a{n}", base, seed=n) for n in range(2)]
    engine = _engine(tiny_model("llama"))
    for n in range(2):
        engine.load(f"a{n}", files[n])
    prompt = _prompts(1, seed=5, longest=40)[0] + list(range(30, 60))
    alone = {key: peft_answers(base, folder, [prompt], 12)[0]
             for key, folder in ((BASE, None), ("a0", files[0].folder), ("a1", files[1].folder))}  # fmt: skip
    for _ in range(2):
        for key in (BASE, "a0", "a1"):
            answer = ask(engine, prompt, key).wait()
            assert answer.ids == alone[key]
    assert answer.finish.n_reused == len(prompt) - 1
    # At once: the first is read, the others take its beginning over.
    begun = [ask(engine, prompt[:40] + [100 + n] * 9, "a0") for n in range(4)]
    assert [answer.wait().finish.n_reused >= 39 for answer in begun] == [True] * 4
    engine.close()


def test_a_new_version_under_an_old_key_starts_from_nothing(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = [open_written(tmp_path / f"a{n}", base, seed=n) for n in range(2)]
    engine = _engine(tiny_model("llama"))
    prompt = list(range(10, 60))
    alone = [peft_answers(base, one.folder, [prompt], 12)[0] for one in files]
    assert alone[0] != alone[1]
    for n in (0, 1, 0, 1):
        engine.load("same", files[n])
        answer = ask(engine, prompt, "same").wait()
        assert answer.ids == alone[n] and answer.finish.n_reused == 0
        engine.unload("same")
    engine.close()


def test_sampling_depends_on_the_seed_alone_not_on_the_neighbours(tiny_bases):
    engine = _engine(tiny_model("llama"), max_running=5)
    prompt, how = list(range(5, 25)), {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    alone = [ask(engine, prompt, seed=seed, **how).wait().ids for seed in range(6)]
    crowd = [ask(engine, p, temperature=2.0) for p in _prompts(7, seed=9)]
    again = [ask(engine, prompt, seed=seed, **how) for seed in range(6)]
    assert [answer.wait().ids for answer in again] == alone
    assert len(set(map(tuple, alone))) > 3
    assert all(len(answer.wait().ids) == 12 for answer in crowd)
    engine.close()


def test_logprobs_are_those_of_the_plain_model():
    model = tiny_model("llama")
    engine = _engine(tiny_model("llama"))
    prompt = list(range(5, 25))
    answer = ask(engine, prompt, n_logprobs=5).wait()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for place, token in enumerate(answer.tokens):
        values, ids = logprobs[place].topk(5)
        assert [pair[0] for pair in token.top] == ids.tolist()
        assert [pair[1] for pair in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-4)
    engine.close()


def test_an_answer_ends_at_the_end_of_turn_at_its_limit_and_at_the_context():
    engine = NativeEngine(tiny_model("llama"), range(3, 500), max_context_tokens=30)
    ended = ask(engine, list(range(5, 25)), ignore_end=False).wait()
    assert (ended.ids, ended.finish.reason) == ([], "stop")
    limited = ask(engine, list(range(5, 25)), max_tokens=4).wait()
    assert (len(limited.ids), limited.finish.reason, limited.finish.n_generated) == (4, "length", 4)
    full = ask(engine, list(range(5, 25)), max_tokens=400).wait()
    assert (len(full.ids), full.finish.reason) == (10, "length")
    with pytest.raises(RequestError, match="30 tokens"):
        ask(engine, list(range(30)))
    with pytest.raises(RequestError):
        ask(engine, [])
    engine.close()


def test_cancelled_answers_make_at_most_one_more_token_and_leave_the_others_as_they_were():
    prompts = _prompts(12, seed=2)
    engine = _engine(tiny_model("llama"), max_running=4)
    alone = [ask(engine, prompt, max_tokens=30).wait().ids for prompt in prompts]
    begun, after = [], {}
    for n, prompt in enumerate(prompts):
        begun.append(ask(engine, prompt, max_tokens=30 if n % 2 else 200))
    for n in range(0, 12, 2):
        begun[n].answering.cancel()
        after[n] = begun[n].events.qsize()
    for n, answer in enumerate(begun):
        answer.wait()
        if n % 2:
            assert answer.ids == alone[n]
        else:
            assert answer.finish.reason == "cancelled"
            assert len(answer.tokens) <= after[n] + 1
    facts = engine.facts()
    assert (facts.n_running, facts.n_waiting) == (0, 0)
    engine.close()


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = [open_written(tmp_path / f"a{n}", base, seed=n) for n in range(3)]
    engine = _engine(tiny_model("llama"), max_adapters=2, max_waiting=3, max_running=1)
    engine.load("a0", files[0])
    with pytest.raises(ConflictError):
        engine.load("a0", files[1])
    config = tiny_model("llama").config
    config.intermediate_size = 96
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(AdapterMismatchError, match="64 → 96 in the adapter, but 64 → 128"):
        engine.load("narrow", open_written(tmp_path / "other", tmp_path / "narrow", seed=1))
    with pytest.raises(AdapterMismatchError):
        engine.load("gpt2", open_written(tmp_path / "gpt2", tiny_bases("gpt2"), seed=1))
    with pytest.raises(UnsupportedError, match="DoRA"):
        engine.load("dora", open_written(tmp_path / "dora", base, seed=1, use_dora=True))
    with pytest.raises(UnsupportedError, match="rank 128"):
        engine.load("high", open_written(tmp_path / "high", base, seed=1, rank=128))
    engine.load("a1", files[1])
    with pytest.raises(BusyError, match="all 2 places"):
        engine.load("a2", files[2])
    with pytest.raises(MissingInputError):
        ask(engine, [5, 6, 7], "a2")
    begun = [ask(engine, [5, 6, 7], "a0", max_tokens=60)]
    with pytest.raises(ConflictError):
        engine.unload("a0")
    with pytest.raises(BusyError):
        begun += [ask(engine, [5, 6, 7], max_tokens=60) for _ in range(6)]
    engine.close()
    assert {answer.wait().finish.reason for answer in begun} <= {"cancelled", "length"}
    with pytest.raises(DrainingError):
        ask(engine, [5, 6, 7])
    engine.close()


def test_swaps_under_load_are_never_mixed_and_leave_no_memory_behind(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = [open_written(tmp_path / f"a{n}", base, seed=n) for n in range(2)]
    prompts = _prompts(4, seed=4)
    alone = [peft_answers(base, one.folder, prompts, 10) for one in files]
    engine = _engine(tiny_model("llama"), max_running=8)
    engine.load("v0", files[0])
    before = engine.facts().adapter_bytes
    live, wrong, stop = ["v0"], [], threading.Event()

    def client(n):
        while not stop.is_set():
            key = live[0]
            try:
                found = ask(engine, prompts[n], key, max_tokens=10).wait().ids
            except MissingInputError:
                continue  # retired between the look and the call; the fleet's lease forbids that
            if found != alone[int(key[1:]) % 2][n]:
                wrong.append((key, found))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for one in clients:
        one.start()
    for version in range(1, 25):
        engine.load(f"v{version}", files[version % 2])
        live[0] = f"v{version}"
        while True:
            try:
                engine.unload(f"v{version - 1}")
                break
            except ConflictError:
                time.sleep(0.005)
    stop.set()
    for one in clients:
        one.join()
    assert not wrong
    for _ in range(200):
        if engine.facts().n_running == 0 and engine.facts().cache_bytes < 2**20:
            break
        time.sleep(0.01)
    facts = engine.facts()
    assert facts.n_adapters == 1
    assert facts.adapter_bytes <= before * 3
    engine.unload("v24")
    assert engine.facts().adapter_bytes == 0
    engine.close()


def test_an_adapter_on_some_layers_only_changes_those(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    one = open_written(tmp_path / "q", base, seed=1, targets=["q_proj", "up_proj"])
    other = open_written(tmp_path / "all", base, seed=2, rank=8)
    engine = _engine(tiny_model("llama"))
    engine.load("one", one)
    engine.load("other", other)
    prompts = _prompts(6, seed=8)
    begun = [ask(engine, p, ("one", "other")[n % 2]) for n, p in enumerate(prompts)]
    for n, answer in enumerate(begun):
        assert answer.wait().ids == peft_answers(base, (one, other)[n % 2].folder, [prompts[n]], 12)[0]
    engine.close()


def test_numbers_that_are_not_finite_end_that_answer_alone(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    write_adapter(tmp_path / "a", base, seed=1)
    from lora_tune.adapter.door import open_adapter

    engine = _engine(tiny_model("llama"))
    engine.load("a", open_adapter(tmp_path / "a"))
    for weights in engine._pool._residents["a"].groups:
        for change in weights.b:
            change.fill_(float("inf"))
    good, bad = ask(engine, [5, 6, 7], max_tokens=100), ask(engine, list(range(5, 45)), "a")
    ask(engine, list(range(6, 46)), "a")  # both fail in one step
    assert bad.wait().finish.reason == "failed" and "finite" in str(bad.finish.error)
    # A shorter prompt takes the row over while the other goes on: masked places are still multiplied by zero.
    after = [ask(engine, [8, 9]) for _ in range(3)]
    alone = peft_answers(base, None, [[5, 6, 7], [8, 9]], 100)
    assert [answer.wait().ids for answer in after] == [alone[1][:12]] * 3
    assert good.wait().ids == alone[0]
    engine.close()


def test_a_model_with_another_state_is_refused_with_the_reason():
    mamba = hf.AutoModelForCausalLM.from_config(
        hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert unsupported(mamba)
    assert unsupported(tiny_model("llama")) == ""


def test_a_failure_while_adapters_are_brought_in_leaves_nobody_to_the_base(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = open_written(tmp_path / "a", base, seed=1)
    engine = _engine(tiny_model("llama"))
    engine.load("a", files)
    copy, engine._pool._copy = engine._pool._copy, None  # the next one to be brought in fails
    assert ask(engine, [5, 6, 7], "a").wait().finish.reason == "failed"
    engine._pool._copy = copy
    assert ask(engine, [5, 6, 7], "a").wait().ids == peft_answers(base, files.folder, [[5, 6, 7]], 12)[0]
    engine.close()


def test_prompts_are_read_in_the_order_in_which_they_came():
    engine = _engine(tiny_model("llama"), max_running=4)
    begun = [ask(engine, [n + 5] * 200, max_tokens=3 + n % 3) for n in range(12)]
    done = []
    for n, answer in enumerate(begun):
        answer.wait()
        done.append(n)
    assert [answer.finish.reason for answer in begun] == ["length"] * 12
    engine.close()


def test_a_prompt_with_a_token_that_the_base_lacks_is_refused_alone():
    engine = _engine(tiny_model("llama"))
    for prompt in ([5, 512], [-1]):
        with pytest.raises(RequestError, match="512"):
            ask(engine, prompt)
    engine._forward.max_cache_bytes = 10 * engine._forward.max_cache_bytes // engine._forward.most_tokens()
    assert 9 <= engine._forward.most_tokens() <= 10
    with pytest.raises(RequestError, match="memory set aside"):
        ask(engine, [5] * 10)
    short = ask(engine, [5] * 4, max_tokens=100).wait()
    assert (short.finish.reason, len(short.ids) + 4) == ("length", engine._forward.most_tokens())
    engine.close()
