"""Message lists, tool calls and tool lists as other programs write them → Message; refusals name the message."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lora_tune.data.messages import ROLES, Message, ToolCall

MAX_DEPTH = 64
_CALLS = "function_call"

ROLE_NAMES: dict[str, str] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "output"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
    **dict.fromkeys((_CALLS, "tool_call"), _CALLS),
}
"""Role as rows write it → ours; a function_call is an assistant's message that is nothing but calls."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_OWNERS = {
    **dict.fromkeys(("tool_calls", "function_call", *_REASONING), "assistant"),
    **dict.fromkeys(("tool_call_id", "name"), "tool"),
}
_MESSAGE_KEYS = frozenset({*_OWNERS, "train", "weight"})
_MESSAGES = "a list of {role, content}"
_NOTHING: tuple[object, ...] = ("", [], {})


class RowError(ValueError):
    """Why one row cannot be trained on; the caller adds the file and line."""


class MessageKeys(NamedTuple):
    """What the file calls a message's role and content; None for `role` or `from`, `content` or `value`."""

    role: str | None = None
    content: str | None = None


_OUR_KEYS = MessageKeys()


class Turn(NamedTuple):
    """A message, and what errors call the place where it stands."""

    message: Message
    name: str


def read_turns(value: object, column: str, keys: MessageKeys) -> list[Turn]:
    """Return the messages of a list, or of the JSON text of one, named `column[1]` and so on.

    A ShareGPT function call joins the assistant's message right before it: they are one turn.

    Raises:
        RowError: this is no list of messages; the first wrong one is named.
    """
    if isinstance(value, str):
        value = read_json(value, column, _MESSAGES)
    if not isinstance(value, list):
        raise RowError(f"{column} is {kind(value)}; expected {_MESSAGES}")
    if not value:
        raise RowError(f"{column} has no messages")
    turns: list[Turn] = []
    for number, item in enumerate(value, start=1):
        name = f"{column}[{number}]"
        message, only_calls = _message(item, name, keys)
        if only_calls and turns and turns[-1].message.role == "assistant":
            turns[-1] = _joined(turns[-1], message, name)
        else:
            turns.append(Turn(message, name))
    return turns


def read_side(value: object, column: str, keys: MessageKeys, *, role: str) -> list[Turn]:
    """Return one side of a row: a text as one message of that role, one message, or a list of messages.

    Raises:
        RowError: it is none of these.
    """
    if isinstance(value, str):
        return [Turn(Message(role, value), column)]
    if isinstance(value, dict):
        return [Turn(_message(value, column, keys)[0], column)]
    if not isinstance(value, list):
        raise RowError(f"{column} is {kind(value)}; expected text, or {_MESSAGES}")
    return read_turns(value, column, keys)


def read_tools(value: object, column: str) -> str:
    """Return the functions as the text of a JSON list, keys in the author's order; empty without any.

    Each becomes `{type: function, function: {…}}`, as servers hand them to a chat template: what is trained is what is used.

    Raises:
        RowError: this is no list of functions, each `{name, …}` or `{type: function, function: {name, …}}`.
    """
    if isinstance(value, str):
        value = read_json(value, column, "a list of functions") if value.strip() else None
    if value is None or value in _NOTHING:
        return ""
    if not isinstance(value, list):
        raise RowError(f"{column} is {kind(value)}; expected a list of functions")
    tools = []
    for number, item in enumerate(value, start=1):
        name = f"{column}[{number}]"
        tool = function = _object(item, name, "{name, description, parameters}")
        if "function" in tool:
            name = f"{name}.function"
            function = _object(tool["function"], name, "{name, description, parameters}")
        else:
            tool = {"type": "function", "function": function}
        _filled_text(function, "name", name)
        tools.append({"type": "function", **tool})
    return _written(tools, column)


def read_json(text: str, name: str, expected: str) -> object:
    """Return the value of a JSON text.

    Raises:
        RowError: it is no JSON, has a key twice, or is nested more than 64 deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_keys_once, parse_constant=_no_number)
    except json.JSONDecodeError as err:
        reason = f"is a text that is not JSON ({err.msg} at character {err.pos + 1})"
    except RowError as err:
        reason = f"is JSON where {err}"
    except (ValueError, RecursionError):  # ValueError: a number of thousands of digits
        reason = "is JSON with a number too long or nested too deep"
    else:
        if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
            _written(value, name)  # an escaped half of a surrogate pair is no text
        return value
    raise RowError(f"{name} {reason}; expected {expected}")


def kind(value: object) -> str:
    """Return what sort of JSON value this is, with its article."""
    names = {"NoneType": "a null", "bool": "a true/false", "int": "a number", "float": "a number",
             "dict": "an object", "str": "a text", "list": "a list"}  # fmt: skip
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def shown(text: str) -> str:
    """Return a short quoted piece of a text, for errors."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _message(item: object, name: str, keys: MessageKeys) -> tuple[Message, bool]:
    """Return the message, and whether it is a ShareGPT function call."""
    whole = _object(item, name, "{role, content}")
    if len(whole) == 2 and whole.get("role") in ROLES and isinstance(whole.get("content"), str) and keys == _OUR_KEYS:
        return Message(whole["role"], whole["content"]), False  # nearly every message there is
    filled = _without_nulls(whole)
    role_key = keys.role or ("from" if "from" in filled and "role" not in filled else "role")
    shared = "content" not in filled and ("value" in filled or role_key == "from")
    content_key = keys.content or ("value" if shared else "content")
    if role_key not in filled:
        raise RowError(_lacking(whole, role_key, name))
    role = _role(filled[role_key], f"{name}.{role_key}", name)
    more = {key: filled[key] for key in filled if key not in (role_key, content_key)}
    if role == _CALLS:
        return _calling(whole, content_key, more, name), True
    extras = _extras(more, role, name) if more else {}
    if content_key in filled:
        return Message(role, _content(filled[content_key], f"{name}.{content_key}"), **extras), False
    if not extras.get("tool_calls"):
        raise RowError(_lacking(whole, content_key, name))
    return Message(role, "", **extras), False


def _role(value: object, key_name: str, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{key_name} is {kind(value)}; expected text")
    role = ROLE_NAMES.get(value) or ROLE_NAMES.get(value.lower())
    if role is None:
        others = ", ".join(other for other in ROLE_NAMES if other not in ROLES)
        raise RowError(f"{name} has role {shown(value)}; known roles: {', '.join(ROLES)} (also {others})")
    return role


def _content(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)}; expected text, or a list of {{type: text, text}}")
    texts = []
    for number, item in enumerate(value, start=1):
        part_name = f"{name}[{number}]"
        part = _without_nulls(_object(item, part_name, "{type: text, text}"))
        if part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise RowError(f"{part_name} is {_part(part)}; only {{type: text, text}} can be trained on")
        texts.append(_text(part["text"], f"{part_name}.text"))
    return "".join(texts)


def _part(part: Mapping[str, Any]) -> str:
    named = isinstance(part.get("type"), str) and part["type"] != "text"
    return f"of type {shown(part['type'])}" if named else f"{{{', '.join(sorted(part))}}}"


def _extras(more: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """Return what else the message says, as fields of Message."""
    unknown = sorted(more.keys() - _MESSAGE_KEYS)
    if unknown:
        raise RowError(
            f"{name} has {', '.join(unknown)}; a message is {{role, content}} and may have "
            f"{', '.join(sorted(_MESSAGE_KEYS))}: nothing else is trained"
        )
    said = {key: value for key, value in more.items() if key in ("train", "weight") or value not in _NOTHING}
    for key in said:
        if _OWNERS.get(key, role) != role:
            raise RowError(f"{name} ({role}) has {key}, which only {_OWNERS[key]} messages have")
    extras: dict[str, Any] = {
        "name": _text(said.get("name", ""), f"{name}.name"),
        "call_id": _text(said.get("tool_call_id", ""), f"{name}.tool_call_id"),
        "train": _train(said, role, name),
    }
    if role == "assistant":
        extras |= {"reasoning": _reasoning(said, name), "tool_calls": _tool_calls(said, name)}
    return extras


def _reasoning(said: Mapping[str, Any], name: str) -> str:
    found = [key for key in _REASONING if key in said]
    if len(found) > 1:
        raise RowError(f"{name} has {' and '.join(found)}; keep one: they name the same thing")
    return _text(said[found[0]], f"{name}.{found[0]}") if found else ""


def _train(said: Mapping[str, Any], role: str, name: str) -> bool | None:
    train, weight = said.get("train"), said.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{name}.train is {kind(train)}; expected true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"{name}.weight is {weight!r:.20}; expected 0 or 1: messages are trained or not, never in part")
    if train is not None and weight is not None and train != bool(weight):
        raise RowError(f"{name} has train: {str(train).lower()} and weight: {weight:g}; they say opposite things")
    chosen = train if weight is None else bool(weight)
    if chosen and role != "assistant":
        raise RowError(f"{name} ({role}) says that it is trained; only assistant messages can be")
    return chosen


def _tool_calls(said: Mapping[str, Any], name: str) -> tuple[ToolCall, ...]:
    if "tool_calls" in said and "function_call" in said:
        raise RowError(f"{name} has tool_calls and function_call; keep tool_calls")
    if "function_call" in said:
        return (_call(said["function_call"], f"{name}.function_call"),)
    return _calls(said["tool_calls"], f"{name}.tool_calls") if "tool_calls" in said else ()


def _calling(whole: Mapping[str, Any], content_key: str, more: Mapping[str, Any], name: str) -> Message:
    """Return a ShareGPT function call: its content is the call, or the list of calls, or the JSON text of that."""
    value = whole.get(content_key)
    if value is None:
        raise RowError(_lacking(whole, content_key, name))
    calls_name = f"{name}.{content_key}"
    if isinstance(value, str):
        value = read_json(value, calls_name, "{name, arguments}, or a list of them")
    extras = _extras(more, "assistant", name) if more else {}
    if extras.get("tool_calls"):
        raise RowError(f"{name} is a function call and has tool_calls too; keep one of them")
    calls = _calls(value, calls_name) if isinstance(value, list) else (_call(value, calls_name),)
    if not calls:
        raise RowError(f"{calls_name} has no calls")
    return Message("assistant", "", **{**extras, "tool_calls": calls})


def _calls(value: object, name: str) -> tuple[ToolCall, ...]:
    if isinstance(value, str):
        value = read_json(value, name, "a list of calls")
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)}; expected a list of {{name, arguments}}")
    return tuple(_call(item, f"{name}[{number}]") for number, item in enumerate(value, start=1))


def _call(item: object, name: str) -> ToolCall:
    outer = _without_nulls(_object(item, name, "{name, arguments}"))
    inner, inner_name = outer, name
    if "function" in outer:
        inner_name = f"{name}.function"
        inner = _without_nulls(_object(outer["function"], inner_name, "{name, arguments}"))
        _known_keys(outer, {"id", "type", "function"}, name)
        _known_keys(inner, {"name", "arguments"}, inner_name)
    else:
        _known_keys(outer, {"id", "type", "name", "arguments"}, name)
    if outer.get("type", "function") != "function":
        raise RowError(f"{name}.type is not 'function'; no other calls are known")
    function = _filled_text(inner, "name", inner_name)
    if "arguments" not in inner:
        raise RowError(f"{inner_name} lacks arguments; write {{}} for a call without any")
    arguments = _arguments(inner["arguments"], f"{inner_name}.arguments")
    return ToolCall(function, arguments, _text(outer.get("id", ""), f"{name}.id"))


def _arguments(value: object, name: str) -> str:
    if isinstance(value, str):
        value = read_json(value, name, "an object")
    return _written(_object(value, name, "an object, or the JSON text of one"), name)


def _joined(turn: Turn, calls: Message, name: str) -> Turn:
    """Return the assistant's words and the call right after them as the one turn that they are."""
    before = turn.message
    if before.train != calls.train:
        raise RowError(f"{name} is one turn with {turn.name}; say train or weight the same in both")
    if calls.reasoning:
        raise RowError(f"{name} is one turn with {turn.name}; the reasoning belongs there")
    return Turn(replace(before, tool_calls=before.tool_calls + calls.tool_calls), turn.name)


def _written(value: object, name: str) -> str:
    try:
        if _too_deep(value):
            raise RecursionError
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError as err:
        raise RowError(f"{name} holds half of a surrogate pair, which is no text") from err
    except RecursionError as err:
        raise RowError(f"{name} is nested more than {MAX_DEPTH} deep") from err
    except (ValueError, TypeError) as err:
        raise RowError(f"{name} holds a value that JSON cannot write ({err})") from err
    return text


def _too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _object(value: object, name: str, expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{name} is {kind(value)}; expected {expected}")
    return value


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Columnar files give every message the keys of all others, as nulls."""
    return {key: value for key, value in values.items() if value is not None} if None in values.values() else values


def _known_keys(values: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise RowError(f"{name} has {', '.join(unknown)}; a call has {', '.join(sorted(known))}")


def _filled_text(values: Mapping[str, Any], key: str, name: str) -> str:
    if values.get(key) is None:
        raise RowError(_lacking(values, key, name))
    text = _text(values[key], f"{name}.{key}")
    if not text.strip():
        raise RowError(f"{name}.{key} is empty")
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; expected text")
    return value


def _lacking(values: Mapping[str, Any], key: str, name: str) -> str:
    if key in values:
        return f"{name}.{key} is a null; expected text"
    return f"{name} lacks {key}; found {', '.join(map(shown, values)) or 'nothing'}"


def _keys_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} is written twice")
    return values


def _no_number(word: str) -> object:
    raise RowError(f"{word} stands for a number")
