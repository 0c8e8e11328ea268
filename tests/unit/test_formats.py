"""Rows of every format → what they say; every mistake is named with its column or message."""

import itertools
import json

import pytest

from lora_tune.data.formats import (
    COLUMNS,
    column_meant,
    detect_format,
    mapping_suggestion,
    ours,
    to_row,
    unused_columns,
)
from lora_tune.data.messages import Conversation, Message, PlainText, Preference, Rated, ToolCall
from lora_tune.data.rows import Row

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
TALK = (Message("user", "hi"), Message("assistant", "hello"))
SYSTEM = Message("system", "be kind")
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLED = Message("assistant", "", tool_calls=(ToolCall("add", '{"b": 1, "a": "é"}'),))


def _read(row_format: str, values: dict, **columns: str):
    return to_row(Row("file:1", values), row_format, columns)


def _conversation(*messages: Message, start: int | None = None, tools: str = "", label: str | None = None):
    return Conversation(messages, len(messages) - 1 if start is None else start, "file:1", tools, label)


CONVERSIONS = {
    "chat": ("chat", {"messages": [USER, ANSWER]}, _conversation(*TALK)),
    "chat in a CSV cell": ("chat", {"messages": json.dumps([USER, ANSWER])}, _conversation(*TALK)),
    "chat in a column conversation": ("chat", {"conversation": [USER, ANSWER]}, _conversation(*TALK)),
    "chat in a column dialog": ("chat", {"dialog": [USER, ANSWER]}, _conversation(*TALK)),
    "chat with a column that is null": ("chat", {"messages": None, "dialog": [USER, ANSWER]}, _conversation(*TALK)),
    "developer": (
        "chat",
        {"messages": [{"role": "developer", "content": "be kind"}, USER, ANSWER]},
        _conversation(SYSTEM, *TALK),
    ),
    "a system column": ("chat", {"system": "be kind", "messages": [USER, ANSWER]}, _conversation(SYSTEM, *TALK)),
    "an empty system column": ("chat", {"system": "", "messages": [USER, ANSWER]}, _conversation(*TALK)),
    "several turns": (
        "chat",
        {"messages": [USER, ANSWER, {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]},
        _conversation(*TALK, Message("user", "more"), Message("assistant", "no"), start=3),
    ),
    "parts": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image_url": None}]}, ANSWER]},
        _conversation(*TALK),
    ),
    "nulls of a columnar file": (
        "chat",
        {"messages": [{**USER, "tool_calls": None, "name": None, "audio": None, "from": None}, {**ANSWER, "weight": None}]},
        _conversation(*TALK),
    ),
    "reasoning": (
        "chat",
        {"messages": [USER, {**ANSWER, "reasoning_content": "a greeting"}]},
        _conversation(TALK[0], Message("assistant", "hello", reasoning="a greeting")),
    ),
    "reasoning by its other names": (
        "chat",
        {"messages": [USER, {**ANSWER, "reasoning": "one"}, USER, {**ANSWER, "thinking": "two"}]},
        _conversation(
            TALK[0], Message("assistant", "hello", reasoning="one"), TALK[0], Message("assistant", "hello", reasoning="two")
        ),
    ),
    "train and weight": (
        "chat",
        {"messages": [{**USER, "train": False}, {**ANSWER, "train": False}, {**USER, "weight": 0}, {**ANSWER, "weight": 1.0, "train": True}]},
        _conversation(
            Message("user", "hi", train=False), Message("assistant", "hello", train=False),
            Message("user", "hi", train=False), Message("assistant", "hello", train=True),
        ),
    ),
    "calls in the OpenAI shape": (
        "chat",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b":1,"a":"\\u00e9"}'}},
                    {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                ]},
                {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
                {"role": "tool", "tool_call_id": "c2", "content": ""},
                ANSWER,
            ],
            "tools": [ADD],
        },
        _conversation(
            TALK[0],
            Message("assistant", "", tool_calls=(ToolCall("add", '{"b": 1, "a": "é"}', "c1"), ToolCall("now", "{}", "c2"))),
            Message("tool", "2", name="add", call_id="c1"), Message("tool", "", call_id="c2"), TALK[1],
            tools='[{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]',
        ),
    ),
    "flat calls after words": (
        "chat",
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": {"b": 1, "a": "é"}}]}], "tools": "[]"},
        _conversation(TALK[0], Message("assistant", "hello", tool_calls=CALLED.tool_calls)),
    ),
    "the older function_call": (
        "chat",
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "add", "arguments": '{"b": 1, "a": "é"}'}},
                      {"role": "function", "name": "add", "content": "2"}, ANSWER],
         "functions": '[{"name": "add"}]'},
        _conversation(TALK[0], CALLED, Message("tool", "2", name="add"), TALK[1], tools='[{"type": "function", "function": {"name": "add"}}]'),
    ),
    "sharegpt": ("sharegpt", {"conversations": [HUMAN, GPT]}, _conversation(*TALK)),
    "sharegpt in a CSV cell": ("sharegpt", {"conversations": json.dumps([HUMAN, GPT])}, _conversation(*TALK)),
    "sharegpt with role and content": ("sharegpt", {"conversations": [USER, ANSWER]}, _conversation(*TALK)),
    "sharegpt with a system column": (
        "sharegpt", {"conversations": [HUMAN, GPT], "system": "be kind"}, _conversation(SYSTEM, *TALK),
    ),
    "sharegpt with a system turn": (
        "sharegpt", {"conversations": [{"from": "system", "value": "be kind"}, HUMAN, GPT]}, _conversation(SYSTEM, *TALK),
    ),
    "sharegpt calls": (
        "sharegpt",
        {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"b": 1, "a": "é"}}'},
                           {"from": "observation", "value": "2"}, GPT],
         "tools": '[{"name": "add", "b": 1, "a": 2}]'},
        _conversation(TALK[0], CALLED, Message("tool", "2"), TALK[1], tools='[{"type": "function", "function": {"name": "add", "b": 1, "a": 2}}]'),
    ),
    "sharegpt words and then calls are one turn": (
        "sharegpt",
        {"conversations": [HUMAN, GPT, {"from": "function_call", "value": '[{"name": "add", "arguments": {}}, {"name": "now", "arguments": {}}]'},
                           {"from": "function_call", "value": {"name": "add", "arguments": "{}"}}, {"from": "tool", "value": "2"}, GPT]},
        _conversation(
            TALK[0], Message("assistant", "hello", tool_calls=(ToolCall("add", "{}"), ToolCall("now", "{}"), ToolCall("add", "{}"))),
            Message("tool", "2"), TALK[1],
        ),
    ),
    "alpaca": ("alpaca", {"instruction": "add", "input": "1 and 2", "output": "3"}, _conversation(Message("user", "add\n1 and 2"), Message("assistant", "3"))),
    "alpaca without input": ("alpaca", {"instruction": "hi", "input": None, "output": "hello"}, _conversation(*TALK)),
    "alpaca with everything in the input": ("alpaca", {"instruction": "", "input": "hi", "output": "hello"}, _conversation(*TALK)),
    "alpaca with system and history": (
        "alpaca",
        {"instruction": "hi", "output": "hello", "system": "be kind", "history": [["a", "b"], ["c", "d"]]},
        _conversation(SYSTEM, Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"), *TALK),
    ),
    "alpaca with history in a CSV cell": (
        "alpaca", {"instruction": "hi", "output": "hello", "history": '[["a", "b"]]'},
        _conversation(Message("user", "a"), Message("assistant", "b"), *TALK),
    ),
    "prompt and completion": ("prompt-completion", {"prompt": "hi", "completion": "hello"}, _conversation(*TALK)),
    "prompt and completion as messages": ("prompt-completion", {"prompt": [USER], "completion": [ANSWER]}, _conversation(*TALK)),
    "prompt as messages, completion as text": ("prompt-completion", {"prompt": [USER], "completion": "hello"}, _conversation(*TALK)),
    "prompt as text, completion as one message": ("prompt-completion", {"prompt": "hi", "completion": GPT, "system": "be kind"}, _conversation(SYSTEM, *TALK)),
    "a completion of several messages": (
        "prompt-completion", {"prompt": "hi", "completion": [ANSWER, USER, ANSWER]}, _conversation(*TALK, *TALK, start=1),
    ),
    "text stays as it is": ("text", {"text": " a\n"}, PlainText(" a\n", "file:1")),
    "a label": ("labelled", {"text": "hi", "label": "hello"}, _conversation(*TALK, label="hello")),
    "a category": ("labelled", {"text": "hi", "category": "001"}, _conversation(TALK[0], Message("assistant", "001"), label="001")),
    "a label that is a number": ("labelled", {"text": "hi", "label": 0}, _conversation(TALK[0], Message("assistant", "0"), label="0")),
    "a label that is false": ("labelled", {"text": "hi", "label": False}, _conversation(TALK[0], Message("assistant", "false"), label="false")),
    "kto": ("kto", {"prompt": "hi", "completion": "hello", "label": True}, Rated(_conversation(*TALK), desirable=True)),
    "kto in CSV": ("kto", {"prompt": "hi", "completion": "hello", "label": "False"}, Rated(_conversation(*TALK), desirable=False)),
    "kto with 0": ("kto", {"prompt": [USER], "completion": [ANSWER], "label": "0"}, Rated(_conversation(*TALK), desirable=False)),
    "kto with messages": ("kto", {"messages": [USER, ANSWER], "label": 1}, Rated(_conversation(*TALK), desirable=True)),
    "kto with conversations": ("kto", {"conversations": [HUMAN, GPT], "label": False}, Rated(_conversation(*TALK), desirable=False)),
}  # fmt: skip


@pytest.mark.parametrize(("row_format", "values", "expected"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_row_says_what_a_reader_would_say_it_says(row_format, values, expected):
    before = json.dumps(values)
    assert _read(row_format, values) == expected
    assert json.dumps(values) == before


def test_every_format_is_converted_above_and_described():
    assert {row_format for row_format, _, _ in CONVERSIONS.values()} | {"preference"} == set(COLUMNS)


NO = {"role": "assistant", "content": "no"}
SAID_NO = Message("assistant", "no")
PREFERENCES = {
    "texts": {"prompt": "hi", "chosen": "hello", "rejected": "no"},
    "lists": {"prompt": [USER], "chosen": [ANSWER], "rejected": [NO]},
    "one message each": {"prompt": "hi", "chosen": GPT, "rejected": NO},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "no"}},
    "messages": {"messages": [USER], "chosen": "hello", "rejected": [NO]},
    "implicit": {"chosen": [USER, ANSWER], "rejected": [USER, NO]},
    "implicit with a null": {"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, NO]},
    "whole conversations and their prompt": {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, NO], "messages": []},
    "CSV, implicit": {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, NO])},
    "CSV, ShareGPT": {"conversations": json.dumps([HUMAN]), "chosen": json.dumps(GPT), "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("values", PREFERENCES.values(), ids=PREFERENCES)
def test_a_preference_is_one_prompt_and_two_answers(values):
    assert _read("preference", values) == Preference(_conversation(*TALK), _conversation(TALK[0], SAID_NO))


def test_an_implicit_prompt_is_all_that_both_begin_with():
    begin = [{"role": "system", "content": "be kind"}, USER, ANSWER, USER]
    row = _read("preference", {"prompt": "hi", "chosen": [*begin, ANSWER, USER, ANSWER], "rejected": [*begin, NO]})
    assert row == Preference(
        _conversation(SYSTEM, *TALK, *TALK, *TALK, start=4), _conversation(SYSTEM, *TALK, TALK[0], SAID_NO, start=4)
    )


def test_system_and_tools_are_of_both_answers():
    row = _read("preference", {**PREFERENCES["texts"], "system": "be kind", "tools": [ADD]})
    assert row.chosen.tools == row.rejected.tools == json.dumps([ADD])
    assert row.chosen.messages[0] == row.rejected.messages[0] == SYSTEM
    assert row.chosen.completion_start == row.rejected.completion_start == 2


MAPPINGS = [
    ("prompt-completion", {"question": "hi", "answer": "hello"}, {"prompt": "question", "completion": "answer"}),
    ("prompt-completion", {"completion": "hi", "prompt": "hello"}, {"prompt": "completion", "completion": "prompt"}),
    ("prompt-completion", {"prompt": 5, "q": "hi", "completion": "hello"}, {"prompt": "q"}),
    ("chat", {"dialogue": [USER, ANSWER]}, {"messages": "dialogue"}),
    (
        "chat",
        {"talk": [{"speaker": "human", "text": "hi"}, {"speaker": "gpt", "text": "hello"}], "text": "unused"},
        {"messages": "talk", "role": "speaker", "content": "text"},
    ),
    ("prompt-completion", {"prompt": [{"who": "user", "content": "hi"}], "completion": "hello"}, {"role": "who"}),
    ("alpaca", {"task": "hi", "context": "", "answer": "hello"}, {"instruction": "task", "input": "context", "output": "answer"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row_format", "values", "columns"), MAPPINGS, ids=[str(columns) for _, _, columns in MAPPINGS]
)
def test_columns_and_message_keys_can_have_other_names(row_format, values, columns):
    assert _read(row_format, values, **columns) == _conversation(*TALK)


def test_the_names_of_a_row_after_mapping():
    assert ours(["q", "a", "id"], {"prompt": "q", "completion": "a", "role": "x"}) == ["id", "prompt", "completion"]
    assert ours(["q", "prompt"], {"prompt": "q"}) == ["prompt"]
    assert ours(["prompt"], {"completion": "q"}) == ["prompt"]
    assert ours(["a", "b"], {}) == ["a", "b"]


@pytest.mark.parametrize(("row_format", "values", "columns", "unused"), [
    ("chat", {"messages": [], "conversations": [], "id": 1, "system": "", "tools": None}, {}, ["conversations", "id"]),
    ("chat", {"messages": None, "dialog": []}, {}, ["messages"]),
    ("alpaca", {"instruction": "", "input": "", "output": "", "text": ""}, {}, ["text"]),
    ("labelled", {"text": "", "label": 1, "category": ""}, {}, ["category"]),
    ("labelled", {"text": "", "sort": 1, "label": ""}, {"label": "sort"}, ["label"]),
    ("preference", {"prompt": "", "messages": [], "chosen": "", "rejected": "", "score": 1}, {}, ["messages", "score"]),
    ("kto", {"prompt": "", "completion": "", "messages": [], "label": True}, {}, ["messages"]),
    ("kto", {"prompt": "", "messages": [], "label": True}, {}, ["prompt"]),
    ("prompt-completion", {"q": "", "prompt": "", "completion": ""}, {"prompt": "q"}, ["prompt"]),
    ("chat", {"messages": [], "content": "", "role": ""}, {"role": "role", "content": "content"}, ["content", "role"]),
])  # fmt: skip
def test_what_is_not_read_is_listed_by_the_names_of_the_file(row_format, values, columns, unused):
    assert unused_columns(Row("file:1", values), row_format, columns) == unused


def test_a_misspelling_is_recognised():
    assert column_meant("sytem", "alpaca") == "system"
    assert column_meant("Rejectd", "preference") == "rejected"
    assert column_meant("id", "chat") is None


ALONE = {
    "preference": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "labelled": ("text", "category"),
    "text": ("text",),
}
"""Each format's own columns, in the order in which formats win."""


@pytest.mark.parametrize(("first", "second"), itertools.combinations_with_replacement(ALONE, 2))
@pytest.mark.parametrize("more", [(), ("id", "system", "source")])
def test_of_two_formats_in_one_row_the_same_one_always_wins(first, second, more):
    columns = [*ALONE[first], *ALONE[second], *more]
    assert detect_format(columns) == first
    assert detect_format(columns[::-1]) == first


@pytest.mark.parametrize(("columns", "row_format"), [
    # Columns as well-known sets have them.
    (["prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"], "preference"),
    (["conversations", "chosen", "rejected"], "preference"),
    (["prompt", "chosen", "rejected", "label"], "preference"),
    (["messages", "label"], "kto"),
    (["conversations", "label"], "kto"),
    (["prompt", "prompt_id", "messages"], "chat"),
    (["messages", "category", "text"], "chat"),
    (["conversation", "model"], "chat"),
    (["dialog"], "chat"),
    (["conversations", "tools"], "sharegpt"),
    (["id", "conversations", "system", "prompt"], "sharegpt"),
    (["prompt", "completion", "text"], "prompt-completion"),
    (["instruction", "input", "output", "text"], "alpaca"),
    (["instruction", "output", "label"], "alpaca"),
    (["text", "label"], "labelled"),
    (["text", "label", "label_text"], "labelled"),
    (["text", "intent"], "labelled"),
    (["text", "class"], "labelled"),
    (["text", "category", "summary"], "labelled"),
    (["text", "url", "prompt"], "text"),
    (["text", "summary"], None),
    (["text", "completion"], None),
    (["prompt"], None),
    (["chosen"], None),
    (["label"], None),
    (["instruction", "response"], None),
    (["question", "answer"], None),
    ([], None),
])  # fmt: skip
def test_columns_that_occur_together(columns, row_format):
    assert detect_format(columns) == row_format


@pytest.mark.parametrize(("columns", "line"), [
    (["question", "answer"], "data.columns: {prompt: question, completion: answer}"),
    (["id", "input", "output"], "data.columns: {prompt: input, completion: output}"),
    (["query", "response"], "data.columns: {prompt: query, completion: response}"),
    (["instruction", "response"], "data.columns: {prompt: instruction, completion: response}"),
    (["instruction", "context", "response", "category"], "data.columns: {input: context, output: response}"),
    (["prompt", "response"], "data.columns: {completion: response}"),
    (["text", "summary"], "data.columns: {prompt: text, completion: summary}"),
    (["Question", "Final Answer", "Answer"], "data.columns: {prompt: Question, completion: Answer}"),
    (["question", "chosen", "rejected"], "data.columns: {prompt: question}"),
    (["question", "accepted", "rejected"], "data.columns: {prompt: question, chosen: accepted}"),
    (["sentence", "label"], "data.columns: {text: sentence}"),
    (["review", "sentiment"], "data.columns: {text: review, label: sentiment}"),
    (["document"], "data.columns: {text: document}"),
    (["dialogue", "id"], "data.columns: {messages: dialogue}"),
    (["a", "b"], ""), ([], ""), (["messages"], ""),
])  # fmt: skip
def test_known_names_are_suggested_as_a_recipe_line(columns, line):
    assert mapping_suggestion(columns) == line


def test_a_suggestion_is_yaml_that_maps_to_a_format():
    from ruamel.yaml import YAML

    columns = ["Question: the text", "answer"]
    assert mapping_suggestion(["QUESTION", "ANSWER"]) == "data.columns: {prompt: QUESTION, completion: ANSWER}"
    assert mapping_suggestion(columns) == ""
    for names in (["question", "answer"], ["instruction", "context", "reply"], ["tweet", "review", "topic"]):
        mapping = YAML(typ="safe", pure=True).load(mapping_suggestion(names).removeprefix("data.columns: "))
        assert detect_format(ours(names, mapping)) is not None
