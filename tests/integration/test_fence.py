"""A chat template that comes with an adapter is rendered under limits, and to the same text as transformers renders it."""

import json
import os
import time
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError

from lora_tune.adapter.fence import Fence, fence_template
from lora_tune.data.messages import Message
from lora_tune.data.rendering import LossMaskError, render, render_many, template_settings
from lora_tune.errors import AdapterError
from lora_tune.recipe.template import PLAIN_TEMPLATE
from tests.tiny import CHATML, tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))} | {
    "plain": PLAIN_TEMPLATE, "namespace": "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a }}{{ ns.b }}{{ dict(a=1) }}{{ messages | tojson }}",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "json": "{{ messages | tojson(indent=2, sort_keys=true) }}{{ 'é<' | tojson }}",
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {
    "type": "object", "properties": {"town": {"type": "string", "description": "The town"}}, "required": ["town"]}}}]  # fmt: skip
CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>&é\u2028"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "Easy."}, {"role": "user", "content": "And?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"town": "Rome"}}}]},
     {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "Sunny."}],
]  # fmt: skip


@pytest.fixture(scope="module")
def fenced():
    return fence_template(tiny_tokenizer())


def _rendered(tokenizer, **asked):
    try:
        return tokenizer.apply_chat_template(**asked, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as err:
        return type(err) is not AdapterError  # both refuse; the words may differ


def _agree(fenced, tokenizer, names):
    """Return how many texts were written, every one of them twice the same."""
    texts = 0
    for name in names:
        # rendering.py puts a clock that stands still in front
        template = "{% macro strftime_now(format) %}1{% endmacro %}" + TEMPLATES[name]
        for turns in CONVERSATIONS:
            for tools in (None, TOOLS):
                case = {"conversation": turns, "tools": tools, "chat_template": template, "enable_thinking": False}
                for asked in (False, True):
                    ours = _rendered(fenced, add_generation_prompt=asked, **case)
                    assert ours == _rendered(tokenizer, add_generation_prompt=asked, **case), name
                    texts += isinstance(ours, str)
    return texts


def test_templates_of_many_kinds_are_rendered_as_transformers_renders_them(fenced, tokenizer):
    assert _agree(fenced, tokenizer, [*list(TEMPLATES)[:-5:6], *list(TEMPLATES)[-5:]]) > 100


@pytest.mark.slow
def test_every_family_of_templates_is_rendered_as_transformers_renders_it(fenced, tokenizer):
    assert len(TEMPLATES) > 60
    assert _agree(fenced, tokenizer, TEMPLATES) > 500


def test_a_fenced_tokenizer_renders_tokenizes_and_saves_as_before(fenced, tokenizer, tmp_path):
    words = [Message("user", "turn on the lights")]
    assert render(fenced, words, add_generation_prompt=True) == render(tokenizer, words, add_generation_prompt=True)
    assert template_settings(fenced) == template_settings(tokenizer)
    assert fenced("open the door").input_ids == tokenizer("open the door").input_ids
    fenced.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "three gigabytes": "{{ 'x' * 3000000000 }}", "three gigabytes of messages": "{{ messages[0].content * 3000000000 }}",
    "a power": "{{ 9 ** (9 ** 9) }}", "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "a wide field": "{{ 'x' | center(3000000000) }}", "a wide format": "{{ '%3000000000d' % 1 }}", "much text": "{{ lipsum(n=100000) }}",
    "many characters": "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "only for some words": "{% if 'secret' in messages[0].content %}{{ 'x' * 3000000000 }}{% endif %}ok",
}  # fmt: skip


TAKES_A_SECOND = ("loops in loops", "a power", "macros", "much text")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in TAKES_A_SECOND[1:] else name for name in HOSTILE]
)
def test_a_template_that_takes_all_time_or_memory_is_stopped(name):
    fence = Fence()
    try:
        fence.render("hello", {})
        before = time.process_time(), time.perf_counter()
        with pytest.raises(AdapterError) as caught:
            fence.render(HOSTILE[name], {"messages": [{"role": "user", "content": "a secret"}]})
        assert time.process_time() - before[0] < 1.0  # here; the worker has a second of its own
        assert time.perf_counter() - before[1] < 10.0
        assert caught.value.exit_code == 77
        assert caught.value.where == "tokenizer.own_template"
        assert fence.render("hello {{ a }}", {"a": 1}) == "hello 1"
    finally:
        fence.close()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ namespace.__init__.__globals__ }}", "{{ raise_exception.__globals__ }}", "{{ lipsum.__globals__['os'].system('touch canary') }}",
    "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{% for",
    "{{ dict.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ self.__init__.__globals__ }}", "{{ tojson.__globals__ }}",
]  # fmt: skip


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_wants_out_of_its_sandbox_is_refused_or_sees_nothing(
    fenced, tokenizer, template, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    case = {"conversation": CONVERSATIONS[0], "chat_template": template}
    ours, theirs = _rendered(fenced, **case), _rendered(tokenizer, **case)
    assert ours in (True, theirs)
    assert not (tmp_path / "canary").exists()


def test_the_worker_holds_no_secret_and_ends_with_its_fence(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    fence = Fence()
    fence.render("x", {})
    worker = fence._worker
    if Path("/proc").is_dir():
        assert b"hf_canary" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    fence.close()
    assert worker.poll() is not None
    fence.close()
    again = Fence()
    again.render("x", {})
    worker = again._worker
    del again
    assert worker.poll() is not None


def test_a_fenced_tokenizer_takes_thousands_of_rows(fenced):
    rows = [([Message("user", f"turn on light {n}")], "") for n in range(2000)]
    assert render_many(fenced, rows)[1999] == render(fenced, rows[1999][0])
    with pytest.raises(LossMaskError):
        render(fenced, [])


def test_special_tokens_and_text_survive_the_pipe():
    fence = Fence()
    try:
        text = "é\u2028\ud800\x00\U0001f600\n" + "x" * 200_000
        assert fence.render("{{ text }}", {"text": text}) == text
        assert json.loads(fence.render("{{ v | tojson }}", {"v": [None, True, 1.5, {"a": []}]})) == [
            None,
            True,
            1.5,
            {"a": []},
        ]
        assert (
            fence.render(CHATML, {"messages": [{"role": "user", "content": "a"}]}) == "<|im_start|>user\na<|im_end|>\n"
        )
    finally:
        fence.close()
    assert os.environ["NO_COLOR"] == "1"  # ours is untouched
