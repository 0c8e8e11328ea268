"""Stand-ins for what a row says: put in its place, they show where a chat template writes it."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_tune.data.messages import Message, ToolCall

WORDS, REASONING, CALL, ARGUMENT = "words", "reasoning", "tool call", "argument"
"""What a message says is made of."""


@dataclass(frozen=True)
class Part:
    """One thing that a message says, and the mark that stands in for it."""

    kind: str
    """WORDS, REASONING, CALL (the function's name) or ARGUMENT."""

    text: str
    """What it says."""

    mark: str
    """Stands for it in a rendering that is made to find its place."""


class Marks:
    """Stand-ins for what a row says: each is given once, and none is in the row's own text."""

    def __init__(self, text: str) -> None:
        self._stem = "x7f3a9"
        while self._stem in text:
            self._stem += "q"
        self._given = 0

    def new(self) -> str:
        """Return the next mark; it could be a function's name, and no mark is part of another."""
        self._given += 1
        return f"{self._stem}n{self._given}z"

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches every mark that was given."""
        return re.compile(f"{self._stem}n[0-9]+z")


def mark_message(message: Message, marks: Marks) -> tuple[Message, list[Part]]:
    """Return an assistant message with marks for its reasoning, words and called functions, and what they stand for.

    Arguments stay as they are, because their kind (text, number, list) decides how a template writes them.
    """
    parts: list[Part] = []

    def stand_in(kind: str, text: str) -> str:
        if not text.strip():
            return text
        parts.append(Part(kind, text, marks.new()))
        return parts[-1].mark

    marked = replace(
        message,
        reasoning=stand_in(REASONING, message.reasoning),
        content=stand_in(WORDS, message.content),
        tool_calls=tuple(replace(call, name=stand_in(CALL, call.name)) for call in message.tool_calls),
    )
    return marked, parts


def mark_words(message: Message, marks: Marks) -> tuple[Message, list[Part]]:
    """Return any message with marks for what `mark_message` marks, and what they stand for."""
    if message.role == "assistant":
        return mark_message(message, marks)
    if not message.content.strip():
        return message, []
    part = Part(WORDS, message.content, marks.new())
    return replace(message, content=part.mark), [part]


def mark_everything(message: Message, marks: Marks) -> tuple[Message, list[Part]]:
    """Return the message with a mark for each thing it says, arguments leaf by leaf, and what they stand for."""
    if message.role != "assistant":
        if not message.content.strip() and message.role != "tool":
            return message, []
        part = Part(WORDS, message.content, marks.new())
        return replace(message, content=part.mark), [part]
    marked, parts = mark_message(message, marks)
    calls: list[ToolCall] = []
    for call in marked.tool_calls:
        arguments, leaves = _mark_leaves(json.loads(call.arguments), marks)
        calls.append(replace(call, arguments=json.dumps(arguments)))
        parts += leaves
    return replace(marked, tool_calls=tuple(calls)), parts


def mark_tools(tools: str, marks: Marks) -> tuple[str, list[str]]:
    """Return the list of tools with marks for the functions' names, and the marks."""
    marked: list[Any] = []
    given: list[str] = []
    for tool in json.loads(tools):
        given.append(marks.new())
        inner = tool.get("function")
        marked.append(
            {**tool, "function": {**inner, "name": given[-1]}}
            if isinstance(inner, dict)
            else {**tool, "name": given[-1]}
        )
    return json.dumps(marked, ensure_ascii=False), given


def leaves_of(value: Any) -> Iterator[str]:
    """Return every text in a JSON value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves_of(inner)


def _mark_leaves(value: Any, marks: Marks) -> tuple[Any, list[Part]]:
    parts: list[Part] = []

    def stand_in(leaf: Any) -> str:
        parts.append(Part(ARGUMENT, str(leaf), marks.new()))
        return parts[-1].mark

    def marked(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {stand_in(key): marked(item) for key, item in inner.items()}
        if isinstance(inner, list):
            return [marked(item) for item in inner]
        return stand_in(inner)

    return marked(value), parts


def unmark(text: str, parts: Sequence[Part]) -> str:
    """Return the text with the names of called functions back in the place of their marks."""
    for part in parts:
        if part.kind == CALL:
            text = text.replace(part.mark, part.text)
    return text
