"""Row formats → what a row says: chat, ShareGPT, Alpaca, prompt-completion, text, labelled, preference, KTO."""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.data.messages import Conversation, DataRow, Message, PlainText, Preference, Rated, objection
from lora_tune.data.rows import Row
from lora_tune.data.turns import MessageKeys, RowError, Turn, kind, read_json, read_side, read_tools, read_turns, shown

__all__ = [
    "COLUMNS", "MESSAGE_KEYS", "RowError", "column_meant", "detect_format", "mapping_suggestion", "ours", "to_row",
    "unused_columns",
]  # fmt: skip

COLUMNS: dict[str, str] = {
    "chat": "messages: a list of {role, content} (system, user, assistant, tool); optional system, tools",
    "sharegpt": "conversations: a list of {from, value} (human, gpt, function_call, observation); optional system, tools",
    "alpaca": "instruction, output; optional input, system, history: a list of [asked, answered]",
    "prompt-completion": "prompt and completion: texts, or lists of messages; optional system, tools",
    "text": "text: trained as it stands, without a chat template",
    "labelled": "text and label (or category, class, intent); optional system",
    "preference": "chosen and rejected, with prompt (or conversations): texts or messages; optional system, tools",
    "kto": "prompt, completion (or messages) and label: true or false; optional system, tools",
}
"""What each format's columns are, as errors and docs say it."""

MESSAGE_KEYS = ("role", "content")
"""What `data.columns` may map inside a message; every other name in it is a column."""

_LISTS = ("messages", "conversations", "conversation", "dialog")
_LABELS = ("label", "category", "class", "intent")
_SHARED = (("system",), ("tools", "functions"))
_READ: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (_LISTS, *_SHARED),
    "sharegpt": (("conversations", "conversation", "messages", "dialog"), *_SHARED),
    "alpaca": (("instruction",), ("input",), ("output",), ("system",), ("history",)),
    "prompt-completion": (("prompt",), ("completion",), *_SHARED),
    "text": (("text",),),
    "labelled": (("text",), _LABELS, ("system",)),
    "preference": (("prompt", *_LISTS), ("chosen",), ("rejected",), *_SHARED),
    "kto": (("prompt",), ("completion",), _LISTS, ("label",), *_SHARED),
}
"""Format → its columns; of several names for the same thing the first that is filled is read."""

_NAMES = {row_format: tuple(name for group in groups for name in group) for row_format, groups in _READ.items()}
_CHANGES_THE_MEANING = frozenset({"system", "tools", "functions", "history", "images", "videos", "audios"})
"""Columns of other programs' formats without which the rest of the row would say something else."""
_NO_PLACE = {row_format: _CHANGES_THE_MEANING - set(names) for row_format, names in _NAMES.items()}
_WITHOUT_MESSAGES = ("alpaca", "text", "labelled")
_EMPTY: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")  # the last three: cells of a CSV file

_PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem", "user", "source", "text")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "assistant", "target", "summary", "reply")
_SUGGESTED: tuple[dict[str, tuple[str, ...]], ...] = (
    {"messages": ("messages", "dialogue", "turns")},
    {"prompt": _PROMPTS, "chosen": ("chosen", "accepted", "preferred"), "rejected": ("rejected", "dispreferred")},
    {"instruction": ("instruction",), "input": ("input", "context"), "output": _ANSWERS},
    {"prompt": _PROMPTS, "completion": _ANSWERS},
    {"text": ("text", "sentence", "content", "utterance", "review"), "label": (*_LABELS, "sentiment", "topic")},
    {"text": ("text", "content", "document", "body")},
)


@dataclass(frozen=True)
class _Cells:
    """A row's cells under our column names."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    row_format: str
    where: str

    def name(self, column: str) -> str:
        """Return what the file calls our column."""
        return self.columns.get(column, column)

    def text(self, column: str) -> str:
        """Return a text cell that has to be there."""
        value = self.values[self.one_of((column,))]
        if not isinstance(value, str):
            raise RowError(f"{self.name(column)} is {kind(value)}; expected text")
        return value

    def text_or_nothing(self, column: str) -> str:
        """Return a text cell, empty where it is null or absent."""
        return "" if self.values.get(column) is None else self.text(column)

    def one_of(self, names: Sequence[str]) -> str:
        """Return the one of these columns that is read, or refuse the row that has none of them."""
        name = _first(names, self.values)
        if name is None:
            expected = f"format {self.row_format} has {COLUMNS[self.row_format]}"
            raise RowError(f"column {self.name(names[0])!r} is missing; {expected}; found {_listed(self.values)}")
        return name

    def turns(self, names: Sequence[str]) -> list[Turn]:
        """Return the messages of the one of these columns that is read."""
        name = self.one_of(names)
        return read_turns(self.values[name], self.name(name), self.keys)

    def side(self, column: str, *, role: str) -> list[Turn]:
        """Return a text as one message of that role, or the messages that the cell holds."""
        return read_side(self.values[self.one_of((column,))], self.name(column), self.keys, role=role)

    @property
    def keys(self) -> MessageKeys:
        """What the file calls a message's role and content."""
        return MessageKeys(self.columns.get("role"), self.columns.get("content"))


def detect_format(columns: Sequence[str]) -> str | None:
    """Return the format whose columns these are (under our names), or None.

    The first of these that fits is it, whatever else is there: chosen and rejected; label with an answer or messages;
    messages; conversations; prompt and completion; instruction and output; text and a label; text without any column
    that could be its answer.
    """
    there = set(columns)
    answered = {"prompt", "completion"} <= there
    rules = (
        ("preference", {"chosen", "rejected"} <= there),
        ("kto", "label" in there and (answered or not there.isdisjoint(_LISTS))),
        ("chat", "messages" in there),
        ("sharegpt", "conversations" in there),
        ("chat", not there.isdisjoint(_LISTS)),
        ("prompt-completion", answered),
        ("alpaca", {"instruction", "output"} <= there),
        ("labelled", "text" in there and not there.isdisjoint(_LABELS)),
        ("text", "text" in there and there.isdisjoint(_ANSWERS)),
    )
    return next((row_format for row_format, fits in rules if fits), None)


def ours(columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """Return a row's column names after mapping; a column whose name is given to another one is left out."""
    return list(_renamed(dict.fromkeys(columns), mapping))


def mapping_suggestion(columns: Sequence[str]) -> str:
    """Return the recipe line that makes one of our formats of these columns; empty if none comes to mind."""
    lower = {name.lower(): name for name in reversed(columns)}
    for wanted in _SUGGESTED:
        found = {ours_: next((lower[name] for name in names if name in lower), "") for ours_, names in wanted.items()}
        if all(found.values()) and len(set(found.values())) == len(found):
            pairs = [f"{name}: {_in_yaml(theirs)}" for name, theirs in found.items() if theirs != name]
            return f"data.columns: {{{', '.join(pairs)}}}" if pairs else ""
    return ""


def to_row(row: Row, row_format: str, columns: Mapping[str, str]) -> DataRow:
    """Return what the row says.

    Args:
        row: one row of the file.
        row_format: one of `COLUMNS`.
        columns: our names → the file's, for columns and for a message's role and content.

    Raises:
        RowError: the row lacks a column, has the wrong type, breaks the order of roles, or has a filled column
            that would change its meaning and is not trained on.
    """
    if columns:
        _check_mapping(row, row_format, columns)
    cells = _Cells(_renamed(row.values, columns), columns, row_format, row.where)
    for name in sorted(_NO_PLACE[row_format].intersection(cells.values)):
        if cells.values[name] not in _EMPTY:
            raise RowError(
                f"column {name!r} is filled, and format {row_format} has no place for it; "
                "write what it says into the other columns, or take it out of the row"
            )
    return _READERS[row_format](cells)


def unused_columns(row: Row, row_format: str, columns: Mapping[str, str]) -> list[str]:
    """Return the row's columns, as the file names them, that its format does not read."""
    values = _renamed(row.values, columns)
    read = {_first(names, values) for names in _READ[row_format]}
    if row_format == "kto":
        read -= {"prompt", "completion"} if _first(("completion",), values) is None else set(_LISTS)
    theirs = {columns.get(name, name) for name in read if name is not None}
    return [name for name in row.values if name not in theirs]


def column_meant(name: str, row_format: str) -> str | None:
    """Return the format's column that `name` looks like a misspelling of, or None."""
    close = difflib.get_close_matches(name.lower(), _NAMES[row_format], n=1, cutoff=0.7)
    return close[0] if close else None


def _check_mapping(row: Row, row_format: str, columns: Mapping[str, str]) -> None:
    known = _NAMES[row_format] if row_format in _WITHOUT_MESSAGES else (*_NAMES[row_format], *MESSAGE_KEYS)
    for name, theirs in columns.items():
        if name not in known:
            raise RowError(
                f"data.columns maps {name!r}, which format {row_format} does not have; it has {', '.join(known)}"
            )
        if name not in MESSAGE_KEYS and theirs not in row.values:
            raise RowError(
                f"column {theirs!r} is missing (data.columns maps {name} to it); found {_listed(row.values)}"
            )


def _renamed(values: Mapping[str, Any], mapping: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the cells under our names; a column whose name is given to another one is left out."""
    if not mapping:
        return values
    columns = {name: theirs for name, theirs in mapping.items() if name not in MESSAGE_KEYS}
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {name: values[theirs] for name, theirs in columns.items() if theirs in values}


def _first(names: Sequence[str], values: Mapping[str, Any]) -> str | None:
    """Return the first of the columns that is filled, else the first that is there."""
    there = [name for name in names if name in values]
    return next((name for name in there if values[name] is not None), there[0] if there else None)


def _chat(cells: _Cells) -> Conversation:
    turns = cells.turns(_READ[cells.row_format][0])
    return _conversation(cells, turns[:-1], turns[-1:])


def _prompt_completion(cells: _Cells) -> Conversation:
    return _conversation(cells, cells.side("prompt", role="user"), cells.side("completion", role="assistant"))


def _alpaca(cells: _Cells) -> Conversation:
    asked, given = cells.text("instruction"), cells.text_or_nothing("input")
    question = "\n".join(part for part in (asked, given) if part)
    prompt = [*_history(cells), Turn(Message("user", question), cells.name("instruction"))]
    return _conversation(cells, prompt, [Turn(Message("assistant", cells.text("output")), cells.name("output"))])


def _history(cells: _Cells) -> list[Turn]:
    value, name, turns = cells.values.get("history"), cells.name("history"), []
    if isinstance(value, str) and value.strip():
        value = read_json(value, name, "a list of [asked, answered]")
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)}; expected a list of [asked, answered]")
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"{name}[{number}] is not [asked, answered], two texts")
        turns += [
            Turn(Message("user", pair[0]), f"{name}[{number}][1]"),
            Turn(Message("assistant", pair[1]), f"{name}[{number}][2]"),
        ]
    return turns


def _plain(cells: _Cells) -> PlainText:
    text = cells.text("text")
    if not text.strip():
        raise RowError(f"{cells.name('text')} is empty")
    return PlainText(text, cells.where)


def _labelled(cells: _Cells) -> Conversation:
    column = cells.one_of(_LABELS)
    value = cells.values[column]
    if not isinstance(value, str | int):
        raise RowError(f"{cells.name(column)} is {kind(value)}; expected text, a whole number or true/false")
    label = str(value).lower() if isinstance(value, bool) else str(value)
    asked = Turn(Message("user", cells.text("text")), cells.name("text"))
    return _conversation(cells, [asked], [Turn(Message("assistant", label), cells.name(column))], label=label)


def _kto(cells: _Cells) -> Rated:
    conversation = _chat_or_pair(cells)
    return Rated(conversation, desirable=_true_or_false(cells.values[cells.one_of(("label",))], cells.name("label")))


def _chat_or_pair(cells: _Cells) -> Conversation:
    if _first(("completion",), cells.values) is not None or _first(_LISTS, cells.values) is None:
        return _prompt_completion(cells)
    turns = cells.turns(_LISTS)
    return _conversation(cells, turns[:-1], turns[-1:])


def _true_or_false(value: object, name: str) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool | str | int) and str(value).strip().lower() in words:
        return words[str(value).strip().lower()]
    found = shown(value) if isinstance(value, str) else kind(value)
    raise RowError(
        f"{name} is {found}; expected true or false: whether the answer is wanted (if it says something else, name the format in data.format)"
    )


def _preference(cells: _Cells) -> Preference:
    source = _first(("prompt", *_LISTS), cells.values)
    prompt = []
    if source is not None and cells.values[source] is not None:
        prompt = cells.side("prompt", role="user") if source == "prompt" else cells.turns((source,))
    in_json = not prompt or (source != "prompt" and isinstance(cells.values[source or ""], str))
    chosen, rejected = (_answer(cells, column, in_json=in_json) for column in ("chosen", "rejected"))
    if [turn.message for turn in chosen] == [turn.message for turn in rejected]:
        raise RowError(f"{cells.name('chosen')} and {cells.name('rejected')} are the same; nothing is preferred")
    if not prompt or chosen[0].message.role != "assistant":
        prompt, chosen, rejected = _without_common_start(prompt, chosen, rejected)
    return Preference(_conversation(cells, prompt, chosen), _conversation(cells, prompt, rejected))


def _answer(cells: _Cells, column: str, *, in_json: bool) -> list[Turn]:
    """Return one answer; a CSV cell may hold its messages as JSON where the prompt, too, is no plain text."""
    value, name = cells.values[cells.one_of((column,))], cells.name(column)
    if in_json and isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = read_json(value, name, "messages")
    return read_side(value, name, cells.keys, role="assistant")


def _without_common_start(
    prompt: Sequence[Turn], chosen: list[Turn], rejected: list[Turn]
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Return (prompt, chosen, rejected) of two whole conversations that begin alike."""
    names = f"{chosen[0].name} and {rejected[0].name}"
    if chosen[0].message.role == "assistant":
        raise RowError(f"there is no prompt column, and {names} are no whole conversations with the same beginning")
    pairs = list(zip(chosen, rejected, strict=False))
    start = next((i for i, (one, other) in enumerate(pairs) if one.message != other.message), len(pairs))
    if start == len(pairs):
        shorter = min(chosen, rejected, key=len)
        raise RowError(f"{shorter[-1].name} is the last, and up to there chosen and rejected are the same")
    for turn in (chosen[start], rejected[start]):
        if turn.message.role != "assistant":
            raise RowError(f"{turn.name} is the first that differs between chosen and rejected, and it is no answer")
    begun = [turn.message for turn in chosen[:start]]
    given = [turn.message for turn in prompt]
    if given and given[0].role != "system" and begun[0].role == "system":
        begun = begun[1:]
    if begun[: len(given)] != given:
        raise RowError(f"{names} begin with other messages than {prompt[0].name}")
    return chosen[:start], chosen[start:], rejected[start:]


def _conversation(
    cells: _Cells, prompt: Sequence[Turn], completion: Sequence[Turn], *, label: str | None = None
) -> Conversation:
    system = cells.text_or_nothing("system")
    if system:
        first = (*prompt, *completion)[0]
        if first.message.role == "system":
            raise RowError(f"column {cells.name('system')!r} and {first.name} are both system messages; keep one")
        prompt = [Turn(Message("system", system), cells.name("system")), *prompt]
    turns = [*prompt, *completion]
    messages = tuple([turn.message for turn in turns])
    if objection(messages) is not None:
        raise RowError(objection(messages, [turn.name for turn in turns]))
    return Conversation(messages, len(prompt), cells.where, _tools(cells), label)


def _tools(cells: _Cells) -> str:
    filled = [name for name in ("tools", "functions") if cells.values.get(name) not in _EMPTY]
    if len(filled) > 1:
        raise RowError("columns 'tools' and 'functions' are both filled; keep tools")
    return read_tools(cells.values[filled[0]], cells.name(filled[0])) if filled else ""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(values) or "no columns"


def _in_yaml(name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", name) and name.lower() not in ("true", "false", "null")
    return name if plain else json.dumps(name, ensure_ascii=False)


_READERS: dict[str, Callable[[_Cells], DataRow]] = {
    "chat": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain,
    "labelled": _labelled,
    "preference": _preference,
    "kto": _kto,
}
