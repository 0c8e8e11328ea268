"""What a row of data says: conversations, plain texts, preferences; and the rules that make them trainable."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WRITE = json.JSONEncoder(ensure_ascii=False).encode
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """One call that the assistant makes."""

    name: str
    """The function's name."""

    arguments: str
    """The arguments as one JSON object, keys in the author's order."""

    call_id: str = ""
    """What a tool message answers to, where the row gives it."""

    def as_dict(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        called = {"type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}}
        return {"id": self.call_id, **called} if self.call_id else called


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""

    content: str
    """The words; empty only where the assistant calls tools instead."""

    reasoning: str = ""
    """What the assistant thought before it answered."""

    tool_calls: tuple[ToolCall, ...] = ()
    """What the assistant calls after its words."""

    name: str = ""
    """A tool message's function."""

    call_id: str = ""
    """The call that a tool message answers, where the row gives it."""

    train: bool | None = None
    """What the row says of this message: False never trains it, True trains it whatever `train_on` says."""

    @property
    def is_plain(self) -> bool:
        """True for words alone: no reasoning, no tool calls, no function's name."""
        return not (self.reasoning or self.tool_calls or self.name or self.call_id)

    def packed(self) -> list[Any]:
        """Every field in order, for `Conversation.as_json`."""
        calls = [[call.name, call.arguments, call.call_id] for call in self.tool_calls]
        return [self.role, self.content, self.reasoning, calls, self.name, self.call_id, self.train]

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        values: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            values["reasoning_content"] = self.reasoning
        if self.tool_calls:
            values["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name:
            values["name"] = self.name
        if self.call_id:
            values["tool_call_id"] = self.call_id
        return values


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and where the completion begins."""

    messages: tuple[Message, ...]
    """All turns, prompt first."""

    completion_start: int
    """Index of the first message of the completion; what stands before it is the prompt."""

    where: str
    """`file:line` of the row."""

    tools: str = ""
    """The functions that the assistant may call, as a JSON list; empty without any."""

    label: str | None = None
    """The class of a labelled text, which is also the answer."""

    def as_json(self) -> str:
        """The row in one line, without where it stands: equal rows give equal text; `row_from_json` reads it back."""
        turns = [
            [message.role, message.content] if message.is_plain and message.train is None else message.packed()
            for message in self.messages
        ]
        return _WRITE([turns, self.completion_start, self.tools, self.label])

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the completion."""
        return self.messages[: self.completion_start]

    @property
    def final_answer(self) -> str:
        """The words of the last assistant message."""
        return self.messages[-1].content

    def trained_messages(self, train_on: str) -> list[int]:
        """Return the indices of the assistant messages that are trained.

        Args:
            train_on: `assistant` for all of them, `last_assistant` for the last one, `completion` for those in the
                completion. What a message says of itself (`train`) goes first.
        """
        spoken = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        first = {"completion": self.completion_start, "last_assistant": spoken[-1] if spoken else 0}.get(train_on, 0)
        said = {i: self.messages[i].train for i in spoken}
        return [i for i in spoken if (said[i] if said[i] is not None else i >= first)]


@dataclass(frozen=True)
class PlainText:
    """A text that is trained as it stands, without a chat template."""

    text: str
    where: str

    def as_json(self) -> str:
        """The row in one line, without where it stands."""
        return _WRITE(self.text)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt."""

    chosen: Conversation
    rejected: Conversation

    @property
    def where(self) -> str:
        """`file:line` of the row."""
        return self.chosen.where


@dataclass(frozen=True)
class Rated:
    """One answer and whether it is wanted (KTO)."""

    conversation: Conversation
    desirable: bool

    @property
    def where(self) -> str:
        """`file:line` of the row."""
        return self.conversation.where


DataRow = Conversation | PlainText | Preference | Rated


def trained_row(row: DataRow) -> Conversation | PlainText | None:
    """Return what supervised fine-tuning trains of a row: the chosen or wanted answer; None for an unwanted one."""
    if isinstance(row, Preference):
        return row.chosen
    if isinstance(row, Rated):
        return row.conversation if row.desirable else None
    return row


def row_from_json(line: str, where: str) -> Conversation | PlainText:
    """Return the row that `as_json` wrote."""
    value = json.loads(line)
    if isinstance(value, str):
        return PlainText(value, where)
    turns, completion_start, tools, label = value
    return Conversation(tuple(_unpacked(turn) for turn in turns), completion_start, where, tools, label)


def _unpacked(turn: list[Any]) -> Message:
    if len(turn) == 2:
        return Message(*turn)
    role, content, reasoning, calls, name, call_id, train = turn
    return Message(role, content, reasoning, tuple(ToolCall(*call) for call in calls), name, call_id, train)


def objection(messages: Sequence[Message], names: Sequence[str] = ()) -> str | None:
    """Return why these messages cannot be trained on, or None.

    Args:
        messages: all turns of a conversation.
        names: what to call each message; `message 1` and so on without.
    """
    if not messages:
        return "there are no messages"
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            return f"{_name(index, names)} has role {message.role!r}; known roles: {', '.join(ROLES)}"
        if message.role in ("user", "assistant") and not message.tool_calls and not message.content.strip():
            return f"{_name(index, names)} ({message.role}) is empty"
    return _order_objection(messages, names)


def _order_objection(messages: Sequence[Message], names: Sequence[str]) -> str | None:
    """A system message may come first; user and assistant take turns; tools answer calls; the assistant speaks last."""
    first = 1 if messages[0].role == "system" else 0
    if len(messages) == first:
        return f"{_name(0, names)} is a system message alone; the first turn must be the user's"
    if messages[first].role not in ("user", "system"):
        return f"{_name(first, names)} is the {messages[first].role}'s; the first turn must be the user's"
    calling: Message | None = None
    for index in range(first, len(messages)):
        before, message = messages[index - 1] if index > first else None, messages[index]
        if message.role != "tool":
            calling = message if message.tool_calls else None
        reason = _turn_objection(before, message, calling)
        if reason is not None:
            return f"{_name(index, names)} {reason}"
    if messages[-1].role == "assistant":
        return None
    return (
        f"{_name(len(messages) - 1, names)} is the {messages[-1].role}'s; "
        "the last message must be the assistant's: there is no answer to train on"
    )


def _turn_objection(before: Message | None, message: Message, calling: Message | None) -> str | None:
    """Return why the message cannot follow the one before it; `calling` is whose calls the tools answer now."""
    if message.role == "system":
        return "is a system message; only the first may be one"
    if message.role == "tool":
        return _answer_objection(message, calling)
    if before is None:
        return None
    if message.role == before.role:
        return f"is a second {message.role} turn in a row"
    if message.role == "user" and (before.role == "tool" or before.tool_calls):
        return "is the user's, but the assistant has not answered after its tool call"
    return None


def _answer_objection(answer: Message, calling: Message | None) -> str | None:
    """Return why this is no answer of a tool to the assistant's calls."""
    if calling is None:
        return "is a tool's answer, but the assistant called no tool before it"
    asked = [call.call_id for call in calling.tool_calls if call.call_id]
    if not answer.call_id or not asked or answer.call_id in asked:
        return None
    return f"answers call {answer.call_id!r:.40}, but the assistant's calls are {', '.join(asked):.200}"


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if names else f"message {index + 1}"
