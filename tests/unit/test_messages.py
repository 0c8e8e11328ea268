"""Which orders of messages can be trained on, and what is trained of them."""

import itertools

import pytest

from lora_tune.data.messages import (
    Conversation,
    Message,
    PlainText,
    Preference,
    Rated,
    ToolCall,
    objection,
    trained_row,
)

CALL = ToolCall("look_up", '{"word": "owl"}')


def _messages(letters: str) -> list[Message]:
    """Write a conversation as letters: s, u, a, t, and c for an assistant that calls a tool."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "c": "assistant"}
    return [Message(roles[c], "x", tool_calls=(CALL,) if c == "c" else ()) for c in letters]


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "suaua", "uc", "ucta", "uctta", "uctcta", "ucta" * 2, "uauc"])
def test_a_conversation_in_order_has_no_objection(letters):
    assert objection(_messages(letters)) is None


@pytest.mark.parametrize(("letters", "reason"), [
    ("", "there are no messages"),
    ("s", "message 1 is a system message alone; the first turn must be the user's"),
    ("a", "message 1 is the assistant's; the first turn must be the user's"),
    ("sa", "message 2 is the assistant's; the first turn must be the user's"),
    ("ta", "message 1 is the tool's; the first turn must be the user's"),
    ("ssua", "message 2 is a system message; only the first may be one"),
    ("usa", "message 2 is a system message; only the first may be one"),
    ("uasua", "message 3 is a system message; only the first may be one"),
    ("uua", "message 2 is a second user turn in a row"),
    ("suaa", "message 4 is a second assistant turn in a row"),
    ("uca", "message 3 is a second assistant turn in a row"),
    ("uta", "message 2 is a tool's answer, but the assistant called no tool before it"),
    ("uata", "message 3 is a tool's answer, but the assistant called no tool before it"),
    ("uctata", "message 5 is a tool's answer, but the assistant called no tool before it"),
    ("ucua", "message 3 is the user's, but the assistant has not answered after its tool call"),
    ("uctua", "message 4 is the user's, but the assistant has not answered after its tool call"),
    ("u", "message 1 is the user's; the last message must be the assistant's: there is no answer to train on"),
    ("uau", "message 3 is the user's; the last message must be the assistant's: there is no answer to train on"),
    ("uct", "message 3 is the tool's; the last message must be the assistant's: there is no answer to train on"),
])  # fmt: skip
def test_an_order_that_cannot_be_trained_is_refused_at_its_message(letters, reason):
    assert objection(_messages(letters)) == reason


def test_only_the_orders_of_the_rule_pass():
    """All 3,905 orders of up to five messages, against the rule written as a regular expression."""
    import re

    rule = re.compile(r"s?(u(ct+)*a)*u(ct+)*[ac]")
    for count in range(1, 6):
        for letters in map("".join, itertools.product("suatc", repeat=count)):
            assert (objection(_messages(letters)) is None) == (rule.fullmatch(letters) is not None), letters


@pytest.mark.parametrize("words", ["", " ", "\n\t"])
def test_an_empty_turn_is_refused_unless_it_calls_a_tool(words):
    user, assistant = Message("user", "x"), Message("assistant", words)
    assert objection([user, assistant]) == "message 2 (assistant) is empty"
    assert objection([Message("user", words), Message("assistant", "x")]) == "message 1 (user) is empty"
    assert objection([user, Message("assistant", words, reasoning="hm")]) == "message 2 (assistant) is empty"
    assert objection([user, Message("assistant", words, tool_calls=(CALL,))]) is None
    assert objection([*_messages("uc"), Message("tool", words), Message("assistant", "x")]) is None
    assert objection([Message("system", words), user, Message("assistant", "x")]) is None


def test_an_unknown_role_is_refused():
    reason = objection([Message("narrator", "x")])
    assert reason == "message 1 has role 'narrator'; known roles: system, user, assistant, tool"


def test_an_answer_names_a_call_that_was_made():
    calls = tuple(ToolCall("f", "{}", call_id) for call_id in ("one", "two"))
    row = [Message("user", "x"), Message("assistant", "", tool_calls=calls), Message("tool", "1", call_id="two"),
           Message("tool", "2", call_id="one"), Message("tool", "3"), Message("assistant", "x")]  # fmt: skip
    assert objection(row) is None
    row[4] = Message("tool", "3", call_id="three")
    assert objection(row) == "message 5 answers call 'three', but the assistant's calls are one, two"
    row[1] = Message("assistant", "", tool_calls=(CALL,))
    assert objection(row) is None


def test_a_refusal_uses_the_names_that_it_is_given():
    assert objection(_messages("uu"), ["question", "answer"]) == "answer is a second user turn in a row"
    assert objection([Message("user", "")], ["question"]) == "question (user) is empty"


@pytest.mark.parametrize(("said", "expected"), [
    ({}, {"assistant": [2, 4, 6], "last_assistant": [6], "completion": [6]}),
    ({2: True}, {"assistant": [2, 4, 6], "last_assistant": [2, 6], "completion": [2, 6]}),
    ({4: False, 6: False}, {"assistant": [2], "last_assistant": [], "completion": []}),
    ({0: False, 1: False}, {"assistant": [2, 4, 6], "last_assistant": [6], "completion": [6]}),
])  # fmt: skip
def test_what_a_message_says_of_itself_goes_before_train_on(said, expected):
    messages = [Message(m.role, m.content, train=said.get(i)) for i, m in enumerate(_messages("suauaua"))]
    row = Conversation(tuple(messages), 6, "row:1")
    assert {train_on: row.trained_messages(train_on) for train_on in expected} == expected


def test_a_message_is_given_to_templates_with_what_it_has_and_nothing_else():
    call = ToolCall("f", '{"b": 1, "a": [null]}', "id-1")
    message = Message("assistant", "", reasoning="hm", tool_calls=(call,))
    assert message.as_dict() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "id-1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [None]}}}
        ],
    }
    assert list(message.as_dict()["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert Message("tool", "3", name="f", call_id="id-1").as_dict() == {
        "role": "tool", "content": "3", "name": "f", "tool_call_id": "id-1"}  # fmt: skip
    assert Message("user", "x", train=False).as_dict() == {"role": "user", "content": "x"}
    assert (Message("user", "x").is_plain, message.is_plain) == (True, False)


def test_supervised_training_takes_the_wanted_answer():
    good, bad = (Conversation(tuple(_messages("ua")), 1, where) for where in ("row:1", "row:2"))
    assert trained_row(good) is good
    assert trained_row(PlainText("x", "row:1")) == PlainText("x", "row:1")
    assert trained_row(Preference(good, bad)) is good
    assert trained_row(Rated(good, desirable=True)) is good
    assert trained_row(Rated(good, desirable=False)) is None
