"""What the chat template writes, and where in it each answer stands."""

import json
from dataclasses import replace

import pytest

from lora_tune.data import rendering
from lora_tune.data.messages import Conversation, Message, ToolCall
from lora_tune.data.rendering import (
    LossMaskError,
    Span,
    answer_spans,
    fixed_template,
    refuse_control_tokens,
    render,
    render_many,
    special_tokens,
    template_settings,
)
from lora_tune.data.spans import calling_turn_end, plain_turn_end
from tests.tiny import CHATML, tiny_tokenizer

END = "<|im_end|>"
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "description": "Look it up", "parameters": {}}}])
# ChatML that writes tools, calls and reasoning, each piece of it alone so that a test can take one out.
TOOL_LIST = "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
THOUGHT = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
CALLS = "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}"
TOOL_CHATML = (
    TOOL_LIST + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + THOUGHT + "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip


def _tokenizer(template, *special):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _row(*messages, tools=""):
    return Conversation(messages, len(messages) - 1, "row:1", tools=tools)


USER, ANSWER = Message("user", "How high is it?"), Message("assistant", "It is 12 m high.")
PLAIN = _row(USER, ANSWER)
CALLING = _row(
    USER, Message("assistant", "Let me see.", tool_calls=(ToolCall("look", '{"what": {"name": "tower"}, "floors": [3, 7]}'),)),
    Message("tool", "12 m", name="look"), ANSWER, tools=TOOLS,
)  # fmt: skip


def _answers(tokenizer, conversation, *indices):
    text, spans = answer_spans(tokenizer, conversation, indices)
    return [text[span.start : span.end] for span in spans]


# --- Rendering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", [PLAIN, CALLING, _row(USER, replace(ANSWER, reasoning="hm"))], ids=["plain", "calls", "reasoning"])  # fmt: skip
@pytest.mark.parametrize("prompt", [False, True])
def test_without_transformers_private_compiler_the_same_is_written(monkeypatch, conversation, prompt):
    asked = [(conversation.messages, conversation.tools)] * 3
    tokenizer = _tokenizer(TOOL_CHATML)
    fast = render_many(tokenizer, asked, add_generation_prompt=prompt)
    monkeypatch.setattr(rendering, "_COMPILER", "_gone")
    assert render_many(_tokenizer(TOOL_CHATML), asked, add_generation_prompt=prompt) == fast
    assert render(tokenizer, conversation.messages, tools=conversation.tools, add_generation_prompt=prompt) == fast[0]
    with pytest.raises(LossMaskError, match="refuses the roles user"):
        render(_tokenizer("{{ raise_exception('no') }}"), [USER])


def test_a_tokenizer_that_renders_in_its_own_way_is_asked():
    tokenizer = tiny_tokenizer()

    class Own(type(tokenizer)):
        def apply_chat_template(self, conversation, **_):
            return " ".join(turn["content"] for turn in conversation)

    tokenizer.__class__ = Own
    assert render(tokenizer, PLAIN.messages) == "How high is it? It is 12 m high."


def test_of_many_rows_the_refused_one_is_named():
    tokenizer = _tokenizer(CHATML + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}")
    rows = [(PLAIN.messages, ""), (PLAIN.messages, ""), ([USER, ANSWER, USER], ""), (PLAIN.messages, "")]
    with pytest.raises(LossMaskError, match="refuses the roles user, assistant, user: too long") as caught:
        render_many(tokenizer, rows)
    assert caught.value.row == 2
    assert render_many(tokenizer, []) == []


@pytest.mark.parametrize(("template", "reason"), [
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe|not safely callable|SecurityError"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ("{{ 1 / 0 }}", "division"),
    ("{{ messages[9].content.x }}", "no element 9"),
    ("{% for %}", "no Jinja"),
])  # fmt: skip
def test_a_hostile_or_broken_template_is_our_error(template, reason):
    with pytest.raises(LossMaskError, match=reason) as caught:
        render(_tokenizer(template), PLAIN.messages)
    assert "data.chat_template" in caught.value.hint


@pytest.mark.parametrize(("tools", "reason"), [("{", "no JSON"), ("{}", "no list"), ("[1]", "no list")])
def test_tools_that_are_no_list_of_objects_are_refused(tools, reason):
    with pytest.raises(LossMaskError, match=reason):
        render(_tokenizer(TOOL_CHATML), PLAIN.messages, tools=tools)


def test_no_template_and_several_templates_are_refused_with_what_to_do():
    for template, reason in (
        (None, "no chat template"),
        ({"default": CHATML, "tool_use": CHATML}, "default, tool_use"),
    ):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(LossMaskError, match=reason) as caught:
            fixed_template(tokenizer)
        assert "data.chat_template" in caught.value.hint


def test_the_clock_of_a_template_stands_still():
    tokenizer = _tokenizer("{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }} {{ date_string }}")
    assert render(tokenizer, [USER]) == "2024-07-26 26 Jul 2024 26 Jul 2024"
    assert fixed_template(_tokenizer(CHATML)) == CHATML


def test_settings_follow_the_template():
    opens = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n' + ('' if enable_thinking is false else '<think>') }}")  # fmt: skip
    tokenizer = _tokenizer(opens)
    assert template_settings(tokenizer) == {"enable_thinking": False}
    tokenizer.chat_template = CHATML
    assert template_settings(tokenizer) == {}


def test_how_a_template_wants_to_be_asked_is_found_out_once(monkeypatch):
    tokenizer, found, real = _tokenizer(CHATML), [], rendering._find_manner
    monkeypatch.setattr(rendering, "_find_manner", lambda asked: found.append(asked.chat_template) or real(asked))
    for template in (CHATML, TOOL_CHATML, CHATML):
        tokenizer.chat_template = template
        for _ in range(3):
            render(tokenizer, PLAIN.messages)
            answer_spans(tokenizer, PLAIN, [1])
    assert found == [CHATML, TOOL_CHATML]


def test_a_template_of_parts_is_given_parts_and_one_that_writes_them_out_is_not():
    parts = CHATML.replace("message['content']", "message['content'][0]['text']")
    assert render(_tokenizer(parts), PLAIN.messages) == render(_tokenizer(CHATML), PLAIN.messages)
    # Python and JSON show a list as it is: that would train brackets.
    for text in ("message['content'][:1] | string", "message['content'][:1] | tojson"):
        assert "type" not in render(_tokenizer(CHATML.replace("message['content']", text)), PLAIN.messages)


# --- Control tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "tools"), [
    (Message("user", f"a {END}"), ""),
    (Message("assistant", "a", reasoning=END), ""),
    (Message("tool", "a", name=END), ""),
    (Message("tool", "a", call_id=END), ""),
    (Message("assistant", "", tool_calls=(ToolCall(END, "{}"),)), ""),
    (Message("assistant", "", tool_calls=(ToolCall("look", "{}", END),)), ""),
    # JSON can hide it from a search of its text.
    (Message("assistant", "", tool_calls=(ToolCall("look", json.dumps({"a": [{"b": END}]}).replace("<", "\\u003c")),)), ""),
    (Message("assistant", "", tool_calls=(ToolCall("look", json.dumps({END: 1})),)), ""),
    (USER, json.dumps([{"name": "look", "enum": [END]}])),
])  # fmt: skip
def test_a_control_token_in_any_text_of_a_row_is_refused(message, tools):
    tokenizer = tiny_tokenizer()
    with pytest.raises(LossMaskError, match="control token") as caught:
        refuse_control_tokens(_row(USER, message, tools=tools), special_tokens(tokenizer))
    assert END in caught.value.message
    assert ("the tools hold" if tools else f"message 2 ({message.role})") in caught.value.message
    refuse_control_tokens(_row(USER, message, tools=tools), [])


def test_special_tokens_that_are_added_later_are_seen():
    tokenizer = tiny_tokenizer()
    assert "<|new|>" not in special_tokens(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert "<|new|>" in special_tokens(tokenizer)


# --- Spans -----------------------------------------------------------------------------------------------------------


def test_words_calls_and_reasoning_are_the_models_to_write():
    tokenizer = _tokenizer(TOOL_CHATML)
    call = '<call>look{"what": {"name": "tower"}, "floors": [3, 7]}</call>'
    assert _answers(tokenizer, CALLING, 1, 3) == [f"Let me see.{call}{END}", f"It is 12 m high.{END}"]
    thinking = _row(USER, replace(ANSWER, reasoning=" Towers are high.\n"))
    assert _answers(tokenizer, thinking, 1) == [f"<think> Towers are high.\n</think>It is 12 m high.{END}"]
    silent = _row(USER, replace(CALLING.messages[1], content=""), tools=TOOLS)
    assert _answers(tokenizer, silent, 1) == [call + END]


@pytest.mark.parametrize(("old", "new", "reason"), [
    (TOOL_LIST, "", "does not write tools"),
    ("{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}", "does not write tool messages"),
    ("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}", r"does not write the words of message 1 \(user\)"),
    (CALLS, "", "does not write the tool calls of message 2"),
    ("c.function.name +", "", "does not write the tool calls of message 2"),
    ("(c.function.arguments | tojson)", "(c.function.arguments | first)", "does not write the argument 'name'"),
    ("(c.function.arguments | tojson)", "''", "does not write the argument 'what'"),
    (CALLS, CALLS + "{% if m.tool_calls %}{{ messages[loop.index].content + m.content }}{% endif %}", "words of message 2 not exactly once"),
    ("{{ m.content }}" + CALLS, CALLS + "{% if m.tool_calls %}{{ messages[loop.index].content }}{% endif %}{{ m.content }}", "message 3 in the midst of message 2"),
    ("m.role +", "m.role + (' calls' if m.tool_calls else '') +", "differently from how it asks"),
])  # fmt: skip
def test_what_a_template_leaves_out_or_moves_is_refused(old, new, reason):
    assert old in TOOL_CHATML
    with pytest.raises(LossMaskError, match=reason) as caught:
        answer_spans(_tokenizer(TOOL_CHATML.replace(old, new)), CALLING, [1, 3])
    assert "x7f3a9" not in caught.value.message


def test_a_system_message_that_is_not_written_is_refused():
    template = TOOL_CHATML.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    with pytest.raises(LossMaskError, match="does not write the system message"):
        answer_spans(_tokenizer(template), _row(Message("system", "Be kind."), USER, ANSWER), [2])


def test_a_row_whose_reasoning_is_dropped_is_refused_or_trained_on_its_last_turn():
    earlier = _row(USER, replace(ANSWER, reasoning="hm"), USER, replace(ANSWER, reasoning="so"))
    only_last = TOOL_CHATML.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    with pytest.raises(
        LossMaskError, match="drops the reasoning of message 2, once the conversation goes on"
    ) as caught:
        answer_spans(_tokenizer(only_last), earlier, [1, 3])
    assert "completion" in caught.value.hint
    assert _answers(_tokenizer(only_last), earlier, 3) == [f"<think>so</think>It is 12 m high.{END}"]
    with pytest.raises(LossMaskError, match="does not write the reasoning of message 4"):
        answer_spans(_tokenizer(CHATML), earlier, [3])


def test_a_row_that_holds_our_own_marks_is_like_any_other():
    odd = _row(Message("user", "x7f3a9 x7f3a9n1z"), Message("assistant", "x7f3a9n1z x7f3a9qn1z"))
    assert _answers(_tokenizer(CHATML), odd, 1) == [f"x7f3a9n1z x7f3a9qn1z{END}"]


def test_an_answer_that_a_template_takes_for_something_else_is_refused():
    split = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(LossMaskError, match="rewrites message 2"):
        answer_spans(_tokenizer(split), _row(USER, Message("assistant", "a</think>b")), [1])
    with pytest.raises(LossMaskError, match="message 2 says nothing"):
        answer_spans(_tokenizer(CHATML), _row(USER, Message("assistant", " ")), [1])


@pytest.mark.parametrize(("ends", "trained"), [
    ("{{ '<|im_end|>\n' }}", END),
    ("{{ '<|a|><|im_end|>\n' }}", f"<|a|>{END}"),
    ("{{ '\n\n<|im_end|>\n' }}", f"\n\n{END}"),
    # An end-of-text after the whole conversation never follows an end-of-turn in use.
    ("{{ '<|im_end|>' + ('<|endoftext|>' if loop.last and not add_generation_prompt else '') }}", END),
    # gpt-oss: the last turn ends with another token than the earlier ones.
    ("{{ '<|a|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}", "<|a|>"),
])  # fmt: skip
def test_the_end_of_turn_is_trained_once_and_nothing_after_it(ends, trained):
    template = TOOL_CHATML.replace("{{ '<|im_end|>\n' }}", ends)
    assert _answers(_tokenizer(template, "<|a|>"), PLAIN, 1) == ["It is 12 m high." + trained]


@pytest.mark.parametrize("special", [(), ("<call>", "</call>")])
@pytest.mark.parametrize("ends", [END, "<|eom|>"])
def test_a_call_ends_with_its_own_token_wherever_it_stands(special, ends):
    template = TOOL_CHATML.replace("{{ '<|im_end|>\n' }}", f"{{{{ ('{ends}' if m.tool_calls else '{END}') + '\n' }}}}")
    tokenizer = _tokenizer(template, "<|eom|>", *special)
    last = Conversation(CALLING.messages[:2], 1, "row:1", tools=TOOLS)
    for conversation in (CALLING, last):
        text, (span,) = answer_spans(tokenizer, conversation, [1])
        assert text[span.start : span.end].endswith("[3, 7]}</call>" + ends)
        assert span.ender == len(ends)


def test_where_a_turn_ends_is_decided_by_what_is_written_either_way():
    control = ["<e>", "<f>", "</call>"]
    assert plain_turn_end("<e>\n<u>", "<e>\n", control) == (3, 3)
    assert plain_turn_end("<e><f>x", "<e><f>", control) == (6, 6)
    assert plain_turn_end("<e><f>", "<e>\n<u>", control) == (3, 3)
    assert plain_turn_end("<f>", "<e>", control) == (3, 3)
    assert plain_turn_end("\n<e>", None, control) == (4, 4)
    assert plain_turn_end(".", None, control) is None
    assert calling_turn_end(" {}</call><e>\n", " {}</call><e><f>", control) == (13, 3)
    assert calling_turn_end(" {}</call>\n", " {}</call><f>", control) == (10, 7)
    assert calling_turn_end(" {}", None, control) is None


def test_spans_are_places_in_the_returned_text():
    text, spans = answer_spans(_tokenizer(CHATML), _row(USER, ANSWER, USER, ANSWER), [1, 3])
    first = text.index(ANSWER.content)
    second = text.index(ANSWER.content, first + 1)
    length = len(ANSWER.content) + len(END)
    assert spans == [Span(first, first + length, len(END)), Span(second, second + length, len(END))]
    assert answer_spans(_tokenizer(CHATML), PLAIN, []) == (render(_tokenizer(CHATML), PLAIN.messages), [])
