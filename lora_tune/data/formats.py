"""Row formats → Conversation: chat messages, prompt-completion, Alpaca."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tune.data.messages import Conversation, Message, objection
from lora_tune.data.rows import Row

COLUMNS: dict[str, str] = {
    "chat": "messages: a list of {role, content}",
    "prompt-completion": "prompt and completion: texts, or lists of messages",
    "alpaca": "instruction, input (may be empty), output",
}
"""What each format's columns are, as errors and docs say it."""


_USED = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output", "system"),
}
_CHANGES_THE_MEANING = ("tools", "functions", "history", "images")
"""Columns of other programs' formats without which the rest of the row would say something else."""


class RowError(ValueError):
    """Why one row is not a conversation; the caller adds the file and line."""


def detect_format(columns: Sequence[str]) -> str | None:
    """Return the format whose columns these are, or None."""
    present = set(columns)
    if "messages" in present:
        return "chat"
    if {"prompt", "completion"} <= present:
        return "prompt-completion"
    if {"instruction", "output"} <= present:
        return "alpaca"
    return None


def to_conversation(row: Row, row_format: str) -> Conversation:
    """Return the row as a conversation.

    Raises:
        RowError: the row lacks a column, has the wrong type, breaks the order of roles, or has a filled column
            that would change its meaning and is not trained on.
    """
    for name in _CHANGES_THE_MEANING:
        if row.values.get(name) not in (None, "", [], {}):
            raise RowError(
                f"column {name!r} is filled, and format {row_format} has no place for it; "
                "write what it says into the other columns, or take it out of the row"
            )
    readers = {"chat": _chat, "prompt-completion": _prompt_completion, "alpaca": _alpaca}
    messages, completion_start = readers[row_format](row.values)
    reason = objection(messages)
    if reason is not None:
        raise RowError(reason)
    return Conversation(tuple(messages), completion_start, row.where)


def unused_columns(row: Row, row_format: str) -> list[str]:
    """Return the row's columns that its format does not read."""
    return [name for name in row.values if name not in _USED[row_format]]


def column_meant(name: str, row_format: str) -> str | None:
    """Return the format's column that `name` looks like a misspelling of, or None."""
    close = difflib.get_close_matches(name.lower(), _USED[row_format], n=1, cutoff=0.7)
    return close[0] if close else None


def _chat(values: Mapping[str, Any]) -> tuple[list[Message], int]:
    messages = _messages(_column(values, "messages", "chat"), "messages")
    return messages, max(len(messages) - 1, 0)


def _prompt_completion(values: Mapping[str, Any]) -> tuple[list[Message], int]:
    prompt = _side(_column(values, "prompt", "prompt-completion"), "prompt", role="user")
    completion = _side(_column(values, "completion", "prompt-completion"), "completion", role="assistant")
    return prompt + completion, len(prompt)


def _alpaca(values: Mapping[str, Any]) -> tuple[list[Message], int]:
    asked = _text(_column(values, "instruction", "alpaca"), "instruction")
    given = _text_or_nothing(values, "input")
    system = _text_or_nothing(values, "system")
    answer = _text(_column(values, "output", "alpaca"), "output")
    prompt = [Message("system", system)] if system else []
    prompt.append(Message("user", f"{asked}\n{given}" if given else asked))
    return [*prompt, Message("assistant", answer)], len(prompt)


def _side(value: object, column: str, *, role: str) -> list[Message]:
    if isinstance(value, str):
        return [Message(role, value)]
    return _messages(value, column)


def _messages(value: object, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f"{column} is a {_kind(value)}; expected a list of {{role, content}}")
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise RowError(f"{column}[{number}] is a {_kind(item)}; expected {{role, content}}")
        unknown = sorted(set(item) - {"role", "content"})
        if unknown:
            raise RowError(
                f"{column}[{number}] has {', '.join(unknown)}; a message is {{role, content}}, nothing else is trained"
            )
        if "role" not in item or "content" not in item:
            raise RowError(f"{column}[{number}] lacks {'role' if 'role' not in item else 'content'}")
        messages.append(
            Message(
                _text(item["role"], f"{column}[{number}].role"), _text(item["content"], f"{column}[{number}].content")
            )
        )
    return messages


def _column(values: Mapping[str, Any], name: str, row_format: str) -> object:
    if name not in values:
        raise RowError(
            f"column {name!r} is missing; format {row_format} has {COLUMNS[row_format]}; found {', '.join(values)}"
        )
    return values[name]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is a {_kind(value)}; expected text")
    return value


def _text_or_nothing(values: Mapping[str, Any], name: str) -> str:
    return "" if values.get(name) is None else _text(values[name], name)


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "bool": "true/false",
        "int": "number",
        "float": "number",
        "dict": "object",
        "str": "text",
    }
    return names.get(type(value).__name__, type(value).__name__)
