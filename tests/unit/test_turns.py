"""Seeded mistakes in rows: each is refused with the message or column, what was found and what was expected."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_tune.data.formats import COLUMNS, RowError, detect_format, ours, to_row, unused_columns
from lora_tune.data.rows import Row

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}


def _chat(*messages: object, **columns: object) -> tuple[str, dict]:
    return "chat", {"messages": list(messages), **columns}


def _said(**more: object) -> tuple[str, dict]:
    return _chat(USER, {**ANSWER, **more})


def _called(call: object) -> tuple[str, dict]:
    return _said(tool_calls=[call])


def _shared(*messages: object, **columns: object) -> tuple[str, dict]:
    return "sharegpt", {"conversations": list(messages), **columns}


MESSAGE_MISTAKES = [
    (("chat", {"messages": 5}), "messages is a number; expected a list of {role, content}"),
    (("chat", {"messages": {"role": "user"}}), "messages is an object; expected a list of {role, content}"),
    (("chat", {"messages": "hello"}), "messages is a text that is not JSON (Expecting value at character 1); expected a list"),
    (("chat", {"messages": '[{"role": "user"'}), "messages is a text that is not JSON (Expecting ',' delimiter at character 17)"),
    (("chat", {"messages": '[{"role": "user", "role": "user"}]'}), "messages is JSON where key 'role' is written twice"),
    (("chat", {"messages": '[{"n": NaN}]'}), "messages is JSON where NaN stands for a number"),
    (("chat", {"messages": "[" * 100_000}), "messages is JSON with a number too long or nested too deep"),
    (("chat", {"messages": "[" * 100 + "]" * 100}), "messages is nested more than 64 deep"),
    (("chat", {"messages": "[" + "1" * 5000 + "]"}), "messages is JSON with a number too long or nested too deep"),
    (("chat", {"messages": r'["\ud800"]'}), "messages holds half of a surrogate pair"),
    (("chat", {"messages": []}), "messages has no messages"),
    (_chat(USER, "hello"), "messages[2] is a text; expected {role, content}"),
    (_chat(USER, None), "messages[2] is a null; expected {role, content}"),
    (_chat({"content": "hi"}, ANSWER), "messages[1] lacks role; found 'content'"),
    (_chat({}, ANSWER), "messages[1] lacks role; found nothing"),
    (_chat({"role": None, "content": "hi"}, ANSWER), "messages[1].role is a null; expected text"),
    (_chat({"role": 1, "content": "hi"}, ANSWER), "messages[1].role is a number; expected text"),
    (_chat({"role": "robot", "content": "hi"}, ANSWER), "messages[1] has role 'robot'; known roles: system, user, assistant, tool"),
    (_chat({"role": "user"}, ANSWER), "messages[1] lacks content; found 'role'"),
    (_chat({"role": "user", "text": "hi"}, ANSWER), "messages[1] has text; a message is {role, content}"),
    (_chat({"role": "user", "content": None}, ANSWER), "messages[1].content is a null; expected text"),
    (_chat({"role": "user", "content": 5}, ANSWER), "messages[1].content is a number; expected text"),
    (_chat({"role": "user", "content": {"a": 1}}, ANSWER), "messages[1].content is an object; expected text"),
    (_chat(USER, {"role": "assistant", "content": None}), "messages[2].content is a null; expected text"),
    (_chat({"role": "user", "content": ["hi"]}, ANSWER), "messages[1].content[1] is a text; expected {type: text, text}"),
    (_chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "messages[1].content[1] is of type 'image_url'; only {type: text, text} can be trained on"),
    (_chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "messages[1].content[1] is {type}; only {type: text, text}"),
    (_chat({"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWER), "messages[1].content[1].text is a number; expected text"),
    (_chat({"role": "user", "content": []}, ANSWER), "messages[1] (user) is empty"),
    (_chat(USER, {"role": "assistant", "content": " \n"}), "messages[2] (assistant) is empty"),
    (_chat({**USER, "mood": "good", "age": 3}, ANSWER), "messages[1] has age, mood; a message is {role, content}"),
    (_chat({**USER, "from": "human"}, ANSWER), "messages[1] has from; a message is {role, content}"),
    (_chat({**USER, "name": "Ann"}, ANSWER), "messages[1] (user) has name, which only tool messages have"),
    (_chat({**USER, "thinking": "hm"}, ANSWER), "messages[1] (user) has thinking, which only assistant messages have"),
    (_chat({**USER, "tool_calls": [{}]}, ANSWER), "messages[1] (user) has tool_calls, which only assistant messages have"),
    (_said(tool_call_id="c1"), "messages[2] (assistant) has tool_call_id, which only tool messages have"),
    (_said(reasoning=["hm"]), "messages[2].reasoning is a list; expected text"),
    (_said(reasoning="hm", thinking="hm"), "messages[2] has reasoning and thinking; keep one"),
    (_said(train="yes"), "messages[2].train is a text; expected true or false"),
    (_said(train=1), "messages[2].train is a number; expected true or false"),
    (_said(weight=0.5), "messages[2].weight is 0.5; expected 0 or 1"),
    (_said(weight=True), "messages[2].weight is True; expected 0 or 1"),
    (_said(weight=0, train=True), "messages[2] has train: true and weight: 0; they say opposite things"),
    (_chat({**USER, "train": True}, ANSWER), "messages[1] (user) says that it is trained; only assistant messages can be"),
    (_chat({**USER, "weight": 1}, ANSWER), "messages[1] (user) says that it is trained; only assistant messages can be"),
    (_chat(USER, USER, ANSWER), "messages[2] is a second user turn in a row"),
    (_chat(USER, ANSWER, ANSWER), "messages[3] is a second assistant turn in a row"),
    (_chat(USER, {"role": "system", "content": "x"}, ANSWER), "messages[2] is a system message; only the first may be one"),
    (_chat(ANSWER), "messages[1] is the assistant's; the first turn must be the user's"),
    (_chat({"role": "system", "content": "x"}, ANSWER), "messages[2] is the assistant's; the first turn must be the user's"),
    (_chat(USER, ANSWER, USER), "messages[3] is the user's; the last message must be the assistant's"),
    (_chat(USER, {"role": "tool", "content": "3"}, ANSWER), "messages[2] is a tool's answer, but the assistant called no tool before it"),
    (_chat({"role": "system", "content": "x"}, USER, ANSWER, system="y"), "column 'system' and messages[1] are both system messages; keep one"),
    (_chat(USER, ANSWER, system=5), "system is a number; expected text"),
]  # fmt: skip

CALL_MISTAKES = [
    (_said(tool_calls={"name": "f", "arguments": {}}), "messages[2].tool_calls is an object; expected a list of {name, arguments}"),
    (_said(tool_calls="f()"), "messages[2].tool_calls is a text that is not JSON"),
    (_said(function_call=["f"]), "messages[2].function_call is a list; expected {name, arguments}"),
    (_said(tool_calls=[{}], function_call={"name": "f"}), "messages[2] has tool_calls and function_call; keep tool_calls"),
    (_called("f"), "messages[2].tool_calls[1] is a text; expected {name, arguments}"),
    (_called({"arguments": {}}), "messages[2].tool_calls[1] lacks name; found 'arguments'"),
    (_called({"name": " ", "arguments": {}}), "messages[2].tool_calls[1].name is empty"),
    (_called({"name": 5, "arguments": {}}), "messages[2].tool_calls[1].name is a number; expected text"),
    (_called({"name": "f"}), "messages[2].tool_calls[1] lacks arguments; write {} for a call without any"),
    (_called({"name": "f", "arguments": None}), "messages[2].tool_calls[1] lacks arguments"),
    (_called({"name": "f", "arguments": []}), "messages[2].tool_calls[1].arguments is a list; expected an object, or the JSON text of one"),
    (_called({"name": "f", "arguments": "[1]"}), "messages[2].tool_calls[1].arguments is a list; expected an object"),
    (_called({"name": "f", "arguments": "a=1"}), "messages[2].tool_calls[1].arguments is a text that is not JSON"),
    (_called({"name": "f", "arguments": ""}), "messages[2].tool_calls[1].arguments is a text that is not JSON"),
    (_called({"name": "f", "arguments": '{"a": 1, "a": 2}'}), "messages[2].tool_calls[1].arguments is JSON where key 'a' is written twice"),
    (_called({"name": "f", "arguments": {"a": float("nan")}}), "messages[2].tool_calls[1].arguments holds a value that JSON cannot write"),
    (_called({"name": "f", "arguments": '{"a": 1e999}'}), "messages[2].tool_calls[1].arguments holds a value that JSON cannot write"),
    (_called({"name": "f", "arguments": {"a": {1, 2}}}), "messages[2].tool_calls[1].arguments holds a value that JSON cannot write"),
    (_called({"name": "f", "arguments": {}, "result": 3}), "messages[2].tool_calls[1] has result; a call has arguments, id, name, type"),
    (_called({"function": {"name": "f", "arguments": {}}, "name": "f"}), "messages[2].tool_calls[1] has name; a call has function, id, type"),
    (_called({"function": {"name": "f", "arguments": {}, "strict": True}}), "messages[2].tool_calls[1].function has strict; a call has arguments, name"),
    (_called({"function": "f"}), "messages[2].tool_calls[1].function is a text; expected {name, arguments}"),
    (_called({"type": "web_search", "name": "f", "arguments": {}}), "messages[2].tool_calls[1].type is not 'function'"),
    (_called({"id": 7, "name": "f", "arguments": {}}), "messages[2].tool_calls[1].id is a number; expected text"),
    (_chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}}]}, USER, ANSWER), "messages[3] is the user's, but the assistant has not answered after its tool call"),
    (_chat(USER, {**ANSWER, "tool_calls": [{"id": "a", "name": "f", "arguments": {}}]}, {"role": "tool", "content": "3", "tool_call_id": "b"}, ANSWER), "messages[3] answers call 'b', but the assistant's calls are a"),
    (_chat(USER, ANSWER, tools=5), "tools is a number; expected a list of functions"),
    (_chat(USER, ANSWER, tools="add, subtract"), "tools is a text that is not JSON (Expecting value at character 1); expected a list of functions"),
    (_chat(USER, ANSWER, tools={"name": "add"}), "tools is an object; expected a list of functions"),
    (_chat(USER, ANSWER, tools=["add"]), "tools[1] is a text; expected {name, description, parameters}"),
    (_chat(USER, ANSWER, tools=[{"description": "adds"}]), "tools[1] lacks name; found 'description'"),
    (_chat(USER, ANSWER, tools=[{"name": "f"}, {"type": "function", "function": {}}]), "tools[2].function lacks name; found nothing"),
    (_chat(USER, ANSWER, tools=[{"name": "f"}], functions=[{"name": "g"}]), "columns 'tools' and 'functions' are both filled; keep tools"),
    (_shared(HUMAN, {"from": "function_call", "value": "add(1, 2)"}), "conversations[2].value is a text that is not JSON"),
    (_shared(HUMAN, {"from": "function_call", "value": '"add"'}), "conversations[2].value is a text; expected {name, arguments}"),
    (_shared(HUMAN, {"from": "function_call", "value": '{"name": "add"}'}), "conversations[2].value lacks arguments"),
    (_shared(HUMAN, {"from": "function_call", "value": "[]"}), "conversations[2].value has no calls"),
    (_shared(HUMAN, {"from": "function_call"}), "conversations[2] lacks value; found 'from'"),
    (_shared(HUMAN, {"from": "function_call", "value": "{}", "tool_calls": [{"name": "f", "arguments": {}}]}), "conversations[2] is a function call and has tool_calls too"),
    (_shared(HUMAN, GPT, {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "train": False}), "conversations[3] is one turn with conversations[2]; say train or weight the same in both"),
    (_shared(HUMAN, GPT, {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "thinking": "hm"}), "conversations[3] is one turn with conversations[2]; the reasoning belongs there"),
    (_shared(HUMAN, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, GPT), "conversations[3] is a second assistant turn in a row"),
    (_shared(HUMAN, {"from": "narrator", "value": "x"}), "conversations[2] has role 'narrator'"),
]  # fmt: skip

ALPACA = {"instruction": "hi", "output": "hello"}
PAIR = {"prompt": "hi", "completion": "hello"}
NO = {"role": "assistant", "content": "no"}
COLUMN_MISTAKES = [
    (("chat", {"text": "hi"}), "column 'messages' is missing; format chat has messages: a list of {role, content}"),
    (("chat", {}), "found no columns"),
    (("prompt-completion", {"prompt": "hi", "answer": "x"}), "column 'completion' is missing; format prompt-completion has prompt and completion"),
    (("prompt-completion", {**PAIR, "prompt": 5}), "prompt is a number; expected text, or a list of {role, content}"),
    (("prompt-completion", {**PAIR, "completion": None}), "completion is a null; expected text, or a list of {role, content}"),
    (("prompt-completion", {**PAIR, "completion": ""}), "completion (assistant) is empty"),
    (("prompt-completion", {**PAIR, "prompt": []}), "prompt has no messages"),
    (("prompt-completion", {**PAIR, "prompt": [USER, ANSWER]}), "completion is a second assistant turn in a row"),
    (("prompt-completion", {**PAIR, "completion": [ANSWER, USER]}), "completion[2] is the user's; the last message must be the assistant's"),
    (("prompt-completion", {**PAIR, "history": [["a", "b"]]}), "column 'history' is filled, and format prompt-completion has no place for it"),
    (("alpaca", {"instruction": "hi"}), "column 'output' is missing; format alpaca has instruction, output"),
    (("alpaca", {**ALPACA, "instruction": None}), "instruction is a null; expected text"),
    (("alpaca", {**ALPACA, "instruction": ""}), "instruction (user) is empty"),
    (("alpaca", {**ALPACA, "output": ["x"]}), "output is a list; expected text"),
    (("alpaca", {**ALPACA, "input": 0}), "input is a number; expected text"),
    (("alpaca", {**ALPACA, "history": 5}), "history is a number; expected a list of [asked, answered]"),
    (("alpaca", {**ALPACA, "history": "a, b"}), "history is a text that is not JSON"),
    (("alpaca", {**ALPACA, "history": [["a", "b"], ["c"]]}), "history[2] is not [asked, answered], two texts"),
    (("alpaca", {**ALPACA, "history": [["a", None]]}), "history[1] is not [asked, answered], two texts"),
    (("alpaca", {**ALPACA, "history": [["a", ""]]}), "history[1][2] (assistant) is empty"),
    (("alpaca", {**ALPACA, "tools": [{"name": "f"}]}), "column 'tools' is filled, and format alpaca has no place for it"),
    (("alpaca", {**ALPACA, "images": ["a.png"]}), "column 'images' is filled, and format alpaca has no place for it"),
    (("text", {"text": 5}), "text is a number; expected text"),
    (("text", {"text": " "}), "text is empty"),
    (("text", {"text": "hi", "system": "x"}), "column 'system' is filled, and format text has no place for it"),
    (("labelled", {"text": "hi"}), "column 'label' is missing; format labelled has text and label"),
    (("labelled", {"text": "hi", "label": None}), "label is a null; expected text, a whole number or true/false"),
    (("labelled", {"text": "hi", "intent": 1.5}), "intent is a number; expected text, a whole number or true/false"),
    (("labelled", {"text": "hi", "label": ""}), "label (assistant) is empty"),
    (("labelled", {"text": "", "label": "x"}), "text (user) is empty"),
    (("kto", {**PAIR, "label": "good"}), "label is 'good'; expected true or false"),
    (("kto", {**PAIR, "label": 2}), "label is a number; expected true or false"),
    (("kto", {**PAIR, "label": None}), "label is a null; expected true or false"),
    (("kto", PAIR), "column 'label' is missing; format kto has"),
    (("kto", {"prompt": "hi", "label": True}), "column 'completion' is missing; format kto has"),
    (("preference", {"prompt": "hi", "chosen": "a"}), "column 'rejected' is missing; format preference has"),
    (("preference", {"prompt": "hi", "chosen": "a", "rejected": "a"}), "chosen and rejected are the same; nothing is preferred"),
    (("preference", {"prompt": "hi", "chosen": "a", "rejected": ""}), "rejected (assistant) is empty"),
    (("preference", {"prompt": "hi", "chosen": "a", "rejected": 5}), "rejected is a number; expected text, or a list of {role, content}"),
    (("preference", {"chosen": "a", "rejected": "b"}), "there is no prompt column, and chosen and rejected are no whole conversations"),
    (("preference", {"chosen": [ANSWER], "rejected": [NO]}), "there is no prompt column, and chosen[1] and rejected[1] are no whole conversations"),
    (("preference", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "ho"}, NO]}), "chosen[1] is the first that differs between chosen and rejected, and it is no answer"),
    (("preference", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, NO]}), "chosen[2] is the last, and up to there chosen and rejected are the same"),
    (("preference", {"prompt": "ho", "chosen": [USER, ANSWER], "rejected": [USER, NO]}), "chosen[1] and rejected[1] begin with other messages than prompt"),
    (("preference", {"prompt": "hi", "chosen": [ANSWER], "rejected": [USER, NO]}), "rejected[1] is a second user turn in a row"),
    (("preference", {"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}), "chosen is a second assistant turn in a row"),
]  # fmt: skip

MISTAKES = [(*row, reason) for row, reason in (*MESSAGE_MISTAKES, *CALL_MISTAKES, *COLUMN_MISTAKES)]


@pytest.mark.parametrize(("row_format", "values", "reason"), MISTAKES, ids=[reason[:60] for *_, reason in MISTAKES])
def test_a_mistake_is_refused_and_named(row_format, values, reason):
    with pytest.raises(RowError) as caught:
        to_row(Row("file:1", values), row_format, {})
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def test_there_are_at_least_forty_kinds_of_mistakes():
    assert len({reason for *_, reason in MISTAKES}) >= 40
    assert {row_format for row_format, *_ in MISTAKES} == set(COLUMNS)


@pytest.mark.parametrize(("values", "columns", "reason"), [
    ({"q": "hi", "completion": "x"}, {"prompt": "question"}, "column 'question' is missing (data.columns maps prompt to it); found q, completion"),
    ({"prompt": "hi", "completion": "x"}, {"promt": "prompt"}, "data.columns maps 'promt', which format prompt-completion does not have; it has prompt, completion, system"),
    ({"question": 5, "completion": "x"}, {"prompt": "question"}, "question is a number; expected text"),
    ({"q": [{"role": "user", "content": "hi"}], "completion": "x"}, {"prompt": "q", "content": "words"}, "q[1] has content; a message is {role, content}"),
    ({"q": [{"who": "user"}], "completion": "x"}, {"prompt": "q", "role": "who", "content": "words"}, "q[1] lacks words; found 'who'"),
    ({"q": [{"who": "robot", "words": "x"}], "completion": "x"}, {"prompt": "q", "role": "who", "content": "words"}, "q[1] has role 'robot'"),
])  # fmt: skip
def test_mistakes_are_named_as_the_file_names_its_columns(values, columns, reason):
    with pytest.raises(RowError) as caught:
        to_row(Row("file:1", values), "prompt-completion", columns)
    assert reason in str(caught.value)


def test_a_message_key_is_no_column_of_a_format_without_messages():
    with pytest.raises(RowError, match=r"data.columns maps 'content', which format text does not have; it has text"):
        to_row(Row("file:1", {"text": "hi"}), "text", {"content": "text"})


WORDS = st.sampled_from(
    ["hi", "", "user", "assistant", "system", "tool", "function_call", "[]", "{}", "true", "\ud800"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "reasoning",
    "train",
    "weight",
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("f") | JSON_VALUES,
        "arguments": st.just({}) | JSON_VALUES,
        "function": JSON_VALUES,
        "id": JSON_VALUES,
    },
)
MESSAGES = st.fixed_dictionaries({}, optional={key: WORDS | JSON_VALUES | st.lists(CALLS, max_size=2) for key in KEYS})
CELLS = JSON_VALUES | st.lists(MESSAGES, max_size=4) | st.lists(MESSAGES, max_size=3).map(json.dumps) | MESSAGES
NAMES = ("messages", "conversations", "dialog", "prompt", "completion", "chosen", "rejected", "label", "text", "instruction",
         "input", "output", "system", "history", "tools", "functions", "category", "images")  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), CELLS, max_size=6), st.sampled_from(sorted(COLUMNS)),
       st.sampled_from([{}, {"prompt": "text"}, {"messages": "prompt", "role": "from"}]))  # fmt: skip
@example({"messages": [[]]}, "chat", {})
def test_any_row_is_read_or_refused_and_nothing_else_happens(values, row_format, columns):
    row = Row("file:1", values)
    try:
        found = to_row(row, row_format, columns)
    except RowError as err:
        assert str(err)
    else:
        assert found.where == "file:1"
    assert set(unused_columns(row, row_format, columns)) <= set(values)
    assert detect_format(ours(list(values), columns)) in {None, *COLUMNS}


def test_every_real_tool_conversation_is_read(shared_data):
    rows = json.loads((shared_data / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    assert {detect_format(list(row)) for row in rows} == {"sharegpt"}
    for number, values in enumerate(rows, start=1):
        found = to_row(Row(f"row {number}", values), "sharegpt", {})
        spoken = [turn["value"] for turn in values["conversations"] if turn["from"] != "function_call"]
        assert [m.content for m in found.messages if not m.tool_calls] == spoken
        called = [json.loads(turn["value"]) for turn in values["conversations"] if turn["from"] == "function_call"]
        calls = [call for message in found.messages for call in message.tool_calls]
        assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls] == called
        assert [tool["function"] for tool in json.loads(found.tools or "[]")] == json.loads(values["tools"])
        assert found.messages[-1].role == "assistant"
    assert len(rows) == 300


def test_every_real_preference_is_read(shared_data):
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    assert {detect_format(list(row)) for row in rows} == {"preference"}
    for number, values in enumerate(rows, start=1):
        found = to_row(Row(f"row {number}", values), "preference", {})
        assert [m.content for m in found.chosen.prompt] == [turn["value"] for turn in values["conversations"]]
        assert found.chosen.prompt == found.rejected.prompt
        assert (found.chosen.final_answer, found.rejected.final_answer) == (
            values["chosen"]["value"], values["rejected"]["value"])  # fmt: skip
    assert len(rows) == 300
