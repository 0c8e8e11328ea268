"""llama.cpp itself on our GGUF files: the quickstart's answers, every family's logits, text cut into the same tokens.

It needs llama-cpp-python, which pip compiles for some minutes: `pip install llama-cpp-python`.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from lora_tune.adapter.convert import export_adapter_to
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.gguf_files import model_to_gguf
from lora_tune.adapter.live import open_live
from lora_tune.cli import recipe_verbs
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.model.dense import quiet
from lora_tune.model.generate import generate_answers, stop_ids
from lora_tune.model.resolve import builtin_source
from tests.integration.test_gguf_export import IDS, WHOLE, _adapter, bases  # noqa: F401 - bases is a fixture
from tests.integration.test_gguf_words import TEXTS

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it compiles for some minutes)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TOKENS = 40


def _ignore(*_):
    """Take no note."""


@pytest.fixture(scope="module")
def real_cache():
    kept, os.environ["LORA_TUNE_CACHE"] = os.environ["LORA_TUNE_CACHE"], os.environ["LORA_TUNE_REAL_CACHE"]
    yield
    os.environ["LORA_TUNE_CACHE"] = kept


@pytest.fixture(scope="module")
def quickstart(real_cache, tmp_path_factory):
    """Return the quickstart's adapter: the one that LORA_TUNE_QUICKSTART names, or one trained now."""
    given = os.environ.get("LORA_TUNE_QUICKSTART")
    if given:
        return open_adapter(Path(given))
    root = tmp_path_factory.mktemp("quickstart")
    recipe_verbs.train(
        ROOT / "recipes" / "quickstart.yaml", (), run_dir=root / "run", dry_run=False, registry=root / "adapters",
        notify=_ignore,
    )  # fmt: skip
    return open_adapter(root / "run" / "adapter")


@pytest.fixture(scope="module")
def ours(quickstart):
    """Return the tokenizer, the held-out rows' prompts and our greedy answers to them."""
    live = open_live(quickstart, _ignore)
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / "home.heldout.jsonl").read_text().splitlines()]
    turns = [[turn for turn in row["messages"] if turn["role"] != "assistant"] for row in rows]
    prompts = [prompt_ids(live.tokenizer, [Message(turn["role"], turn["content"]) for turn in said]) for said in turns]
    ends = stop_ids(live.model, live.tokenizer)
    answers = generate_answers(live.model, live.tokenizer, prompts, max_tokens=ANSWER_TOKENS, ends=ends)
    return live, prompts, answers


@pytest.fixture(scope="module")
def exported(quickstart, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_adapter_to(quickstart, folder, _ignore, to="ollama")
    return folder


def _agreement(model, tokenizer, prompts, answers):
    same = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        given = model.create_completion(
            list(prompt), max_tokens=ANSWER_TOKENS, temperature=0.0, repeat_penalty=1.0, top_p=1.0, min_p=0.0
        )
        same += given["choices"][0]["text"] == tokenizer.decode(answer, skip_special_tokens=True)
    return same / len(prompts)


def _open(path, **more):
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **more)


def test_the_adapter_on_the_packaged_gguf_answers_as_ours(ours, exported):
    live, prompts, answers = ours
    with builtin_source("builtin:smollm2-135m", _ignore) as base:
        agreement = _agreement(_open(base, lora_path=str(exported / "adapter.gguf")), live.tokenizer, prompts, answers)
        without = _agreement(_open(base), live.tokenizer, prompts[:15], answers[:15])
    print(
        f"llama.cpp, packaged Q4_1 base + our adapter: {agreement:.1%} of {len(prompts)} answers are ours; of the first 15, base alone {without:.1%}"
    )
    assert agreement >= 0.95
    assert without <= 0.05


def test_the_adapter_on_our_own_gguf_of_the_base_answers_as_ours(ours, exported):
    live, prompts, answers = ours
    model = _open(exported / "base.gguf", lora_path=str(exported / "adapter.gguf"))
    agreement = _agreement(model, live.tokenizer, prompts, answers)
    print(f"llama.cpp, our bf16 base + our adapter: {agreement:.1%} of {len(prompts)} answers are ours")
    assert agreement >= 0.95
    for text in (*TEXTS, *(live.tokenizer.decode(prompt) for prompt in prompts)):
        found = model.tokenize(text.encode(), add_bos=False, special=True)
        assert found == live.tokenizer(text, add_special_tokens=False)["input_ids"], text


def _logits(path, **more):
    model = _open(path, logits_all=True, **more)
    model.eval(IDS[0].tolist())
    return np.array(model.scores[: IDS.shape[1]])


@pytest.mark.parametrize("family", WHOLE)
def test_every_familys_logits_are_transformers(tmp_path, bases, family):  # noqa: F811
    files, live = _adapter(tmp_path / "a", bases(family), variant="rslora")
    export_adapter_to(files, tmp_path / "out", _ignore, to="gguf", base_name=str(bases(family)))
    base = model_to_gguf(bases(family), tmp_path / "m.gguf", dtype="f16")
    with quiet(), torch.no_grad():
        plain = hf.AutoModelForCausalLM.from_pretrained(bases(family), dtype=torch.float32).eval()
        # llama.cpp keeps keys and values in f16
        assert np.allclose(_logits(base), plain(input_ids=IDS).logits[0].numpy(), atol=0.02)
        adapted = live(input_ids=IDS).logits[0].numpy()
    assert np.allclose(_logits(base, lora_path=str(tmp_path / "out" / "adapter.gguf")), adapted, atol=0.02)
    assert np.abs(adapted - plain(input_ids=IDS).logits[0].detach().numpy()).max() > 0.1
