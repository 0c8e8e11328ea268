"""Which engine a base and its adapters get, and what serving then knows of the base."""

import json

import pytest
import transformers as hf

from lora_tune.adapter.door import CONFIG, open_adapter
from lora_tune.errors import AdapterMismatchError, MissingInputError, UnsupportedError
from lora_tune.model.fingerprint import fingerprint
from lora_tune.recipe.schema import BaseSection
from lora_tune.serving.engine import BASE, Finish, Sampling, Work
from lora_tune.serving.opening import UNSAID_CONTEXT_TOKENS, open_engine
from tests.engines import write_adapter
from tests.tiny import tiny_tokenizer

LIMITS = {"max_adapters": 2, "max_rank": 8, "max_running": 2}


def _ignore(*_):
    """Take no note."""


@pytest.fixture
def opened():
    engines = []

    def open_(folder, **more):
        section = BaseSection(name=str(folder), dtype="fp32")
        engine, base, why = open_engine(section, **({"engine": "auto", "progress": _ignore} | LIMITS | more))
        engines.append(engine)
        return engine, base, why

    yield open_
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """A base without attention."""
    folder = tmp_path_factory.mktemp("mamba")
    config = hf.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    hf.MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def answer(engine, prompt=(5, 6, 7), key=BASE):
    import threading

    tokens, over = [], threading.Event()

    def hear(event):
        if isinstance(event, Finish):
            assert event.error is None
            over.set()
        else:
            tokens.append(event.id)

    engine.submit(Work(tuple(prompt), key, Sampling(5, ignore_end=True)), hear)
    assert over.wait(60)
    return tokens


def test_a_text_model_is_served_natively(opened, tiny_bases):
    engine, base, why = opened(tiny_bases())
    assert (engine.name, why) == ("native", "")
    assert (base.name, base.max_context_tokens) == (tiny_bases().name, 512)
    assert base.weights_digest == fingerprint(tiny_bases()).weights
    assert base.ends == (2,)
    simple, *_ = opened(tiny_bases(), engine="simple")
    assert answer(simple) == answer(engine)


def test_a_dora_adapter_brings_the_simple_engine_and_says_so(opened, tiny_bases, tmp_path):
    dora = open_adapter(write_adapter(tmp_path / "d", tiny_bases(), seed=1, use_dora=True))
    engine, _, why = opened(tiny_bases(), needs=[dora])
    assert engine.name == "simple"
    assert "DoRA" in why
    engine.load("d", dora)
    assert answer(engine, key="d") != answer(engine)
    with pytest.raises(UnsupportedError) as refused:
        opened(tiny_bases(), engine="native", needs=[dora])
    assert "simple" in refused.value.hint


def test_a_base_that_native_cannot_hold_brings_the_simple_engine(opened, recurrent):
    engine, base, why = opened(recurrent)
    assert engine.name == "simple"
    assert why
    assert base.max_context_tokens == UNSAID_CONTEXT_TOKENS
    plain = hf.AutoModelForCausalLM.from_pretrained(recurrent)
    import torch

    with torch.no_grad():
        expected = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer(engine) == expected[0, 3:].tolist()
    with pytest.raises(UnsupportedError):
        opened(recurrent, engine="native")


def test_the_context_is_what_the_base_was_made_for_or_less(opened, tiny_bases):
    assert opened(tiny_bases("gpt2"), max_context=100)[0].max_context_tokens == 100
    assert opened(tiny_bases("gpt2"), max_context=10_000)[1].max_context_tokens == 512


def test_the_base_is_called_as_it_is_told(opened, tiny_bases):
    assert opened(tiny_bases(), served_name="ours")[1].name == "ours"


def test_an_adapter_of_another_base_is_refused_before_the_base_is_loaded(tiny_bases, tmp_path):
    foreign = open_adapter(write_adapter(tmp_path / "g", tiny_bases("gpt2"), seed=1))
    said = []
    with pytest.raises(AdapterMismatchError):
        open_engine(
            BaseSection(name=str(tiny_bases())), engine="auto", progress=lambda label, _: said.append(label),
            needs=[foreign], **LIMITS,
        )  # fmt: skip
    assert said == []


def test_without_a_chat_template_the_adapters_own_is_asked_with(tmp_path, tiny_bases, opened):
    from tests.tiny import CHATML, tiny_model, write_recipe

    folder = tmp_path / "bare"
    # Weights of its own: a base is found again by its weights, and other tests train on the usual ones.
    tiny_model("llama", seed=123).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(MissingInputError) as refused:
        opened(folder)
    assert "template" in refused.value.message
    (tmp_path / "own.jinja").write_text(CHATML)
    from lora_tune.cli import recipe_verbs

    recipe = write_recipe(tmp_path, folder, data={"chat_template": "own.jinja"}, eval={"generate": 0})
    recipe_verbs.train(
        recipe, (), run_dir=tmp_path / "run", dry_run=False, registry=tmp_path / "adapters", notify=_ignore
    )
    files = open_adapter(tmp_path / "run" / "adapter")
    assert json.loads((files.folder / CONFIG).read_text())["peft_type"] == "LORA"
    _, base, _ = opened(folder, needs=[files])
    assert base.tokenizer.chat_template == CHATML
    # <|endoftext|> by the tokenizer, and what the adapter's template ends a turn with.
    assert set(base.ends) == {0, 2}
