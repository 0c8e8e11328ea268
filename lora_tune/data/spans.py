"""Where each answer stands in a rendered row: what the model must write, end-of-turn included. Only text here;
rendering.py asks the chat template.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lora_tune.data.marks import (
    CALL,
    REASONING,
    Marks,
    Part,
    mark_everything,
    mark_message,
    mark_tools,
    mark_words,
    unmark,
)
from lora_tune.data.messages import Message
from lora_tune.errors import DataError

ANOTHER_TEMPLATE = "give another template in data.chat_template"
"""What helps where a template cannot do what the rows need."""

Asked = tuple[Sequence[Message], str]
"""Messages, and the tools as a JSON list or nothing."""


class LossMaskError(DataError):
    """It cannot be said for certain which tokens of a row are trained.

    Args:
        message: what is wrong.
        hint: one action that the user can take next.
        where: `file:line` of the row, where it is known.
        row: position of the row among those that were rendered together.
    """

    def __init__(self, message: str, *, hint: str = "", where: str = "", row: int | None = None) -> None:
        super().__init__(message, hint=hint, where=where)
        self.row = row


@dataclass(frozen=True)
class Span:
    """What the model must write for one message, as [start, end) in the rendered text."""

    start: int
    end: int
    ender: int
    """How many of its last characters end the turn."""


Place = tuple[int, int]
"""Where what one message says begins and ends in the rendered text, as [start, end); blanks around it included."""


@dataclass(frozen=True)
class WrittenRow:
    """One row, what the chat template writes for it, and the template itself to ask again."""

    messages: Sequence[Message]

    tools: str
    """The functions as a JSON list, or nothing."""

    text: str
    """The whole row as the template writes it."""

    write: Callable[[Asked], str]
    """Renders messages."""

    ask: Callable[[Asked], str]
    """Renders messages as a prompt."""

    control: Sequence[str]
    """Every special token."""


def find_places(row: WrittenRow) -> dict[int, Place]:
    """Return where each message stands, by its index, from one rendering with marks in the place of all words.

    Empty where the text is not exactly that rendering with the words put back; a message that is not written in full has
    no place.
    """
    marks = Marks(row.text)
    marked = [mark_words(message, marks) for message in row.messages]
    owner = {part.mark: (index, part) for index, (_, parts) in enumerate(marked) for part in parts}
    try:
        whole = row.write(([message for message, _ in marked], row.tools))
    except LossMaskError:
        return {}
    pieces, written = _between_marks(whole, marks, owner)
    if len(set(written)) < len(written) or not row.text.startswith(pieces[0]):
        return {}
    places: dict[int, Place] = {}
    position = len(pieces[0])
    for mark, piece in zip(written, pieces[1:], strict=True):
        index, part = owner[mark]
        after = _after_words(row.text, _skip_blanks(row.text, position), part.text.strip(), piece)
        if after is None:
            return {}
        places[index] = (places.get(index, (position, 0))[0], after - len(piece))
        position = after
    if position != len(row.text) or _interleaved([owner[mark][0] for mark in written]):
        return {}
    missing = {owner[mark][0] for mark in owner.keys() - set(written)}
    return {index: place for index, place in places.items() if index not in missing}


def _between_marks(whole: str, marks: Marks, owner: Mapping[str, tuple[int, Part]]) -> tuple[list[str], list[str]]:
    """Return the text before, between and after the marks, and the marks; a function that is named again is text."""
    pieces, written, position = [""], [], 0
    named: set[str] = set()
    for found in marks.pattern.finditer(whole):
        pieces[-1] += whole[position : found.start()]
        position = found.end()
        mark = found.group()
        if mark in named:
            pieces[-1] += owner[mark][1].text
            continue
        if owner[mark][1].kind == CALL:
            named.add(mark)
        written.append(mark)
        pieces.append("")
    pieces[-1] += whole[position:]
    return pieces, written


def _interleaved(indices: Sequence[int]) -> bool:
    """True where a message goes on after another one has begun."""
    runs = [index for n, index in enumerate(indices) if n == 0 or indices[n - 1] != index]
    return len(set(runs)) < len(runs)


def answer_span(row: WrittenRow, index: int, place: Place | None = None) -> Span:
    """Return what the model must write for one message, end-of-turn included.

    Args:
        row: the row.
        index: the message's.
        place: where it stands, as `find_places` says; without it, it is looked for.

    Raises:
        LossMaskError: the template writes the message otherwise than it asks for it, leaves a part of it out, or does
            not end the turn.
    """
    messages, name = row.messages, f"message {index + 1}"
    marked, parts = mark_message(messages[index], Marks(row.text))
    if not parts:
        raise LossMaskError(f"{name} says nothing that could be trained", hint="take the row out, or fill the message")
    if place is None:
        whole = row.write(([*messages[:index], marked, *messages[index + 1 :]], row.tools))
        _check_reasoning(row, index, whole, parts)
        place = find_parts(row.text, whole, parts, message=name)
    start, end = place
    prompt = row.ask((messages[:index], row.tools))
    if len(prompt) > start or not row.text.startswith(prompt):
        raise _asked_otherwise(row, index, prompt, start)
    # What stands between the prompt and the words (an empty thinking block, say) is the model's to write.
    turn_end = calling_turn_end if messages[index].tool_calls else plain_turn_end
    found = turn_end(row.text[end:], _other_continuation(row, index, marked, parts), row.control)
    if found is None:
        raise LossMaskError(
            "the chat template writes no end-of-turn token after an assistant message, "
            "so the model would never learn to stop",
            hint="give a template that ends the assistant's turn in data.chat_template",
        )
    return Span(len(prompt), end + found[0], found[1])


def _other_continuation(row: WrittenRow, index: int, marked: Message, parts: Sequence[Part]) -> str | None:
    """Return what follows the message where the row goes on, if it is the last, and where it stops, if it is not."""
    messages = [*row.messages[:index], marked]
    if index == len(row.messages) - 1:
        calls = row.messages[index].tool_calls
        messages.append(
            Message("tool", "a", name=calls[-1].name, call_id=calls[-1].call_id) if calls else Message("user", "a")
        )
    try:
        text = row.write((messages, row.tools))
    except LossMaskError:
        return None
    last = max(parts, key=lambda part: text.find(part.mark))
    _before, mark, after = text.partition(last.mark)
    return unmark(after, parts) if mark else None


def _check_reasoning(row: WrittenRow, index: int, whole: str, parts: Sequence[Part]) -> None:
    mark = next((part.mark for part in parts if part.kind == REASONING), "")
    if mark in whole:
        return
    marked, (thought, *_) = mark_message(row.messages[index], Marks(row.text))
    alone = row.write(([*row.messages[:index], marked], row.tools))
    if thought.mark in alone:
        raise LossMaskError(
            f"the chat template drops the reasoning of message {index + 1}, once the conversation goes on",
            hint="set data.train_on to completion or last_assistant",
        )
    raise LossMaskError(
        f"the chat template does not write the reasoning of message {index + 1}, so it cannot be trained",
        hint=f"take the reasoning out of the rows, or {ANOTHER_TEMPLATE}",
    )


def _asked_otherwise(row: WrittenRow, index: int, prompt: str, start: int) -> LossMaskError:
    last = index == len(row.messages) - 1
    hint = ANOTHER_TEMPLATE if last else "set data.train_on to completion"
    if last and row.messages[index].reasoning:
        hint = "this base is asked for answers without reasoning: take the reasoning out of the rows"
    return LossMaskError(
        f"the chat template writes message {index + 1} differently from how it asks for it"
        f"{'' if last else ', once the conversation goes on'}: "
        f"the prompt ends in {prompt[-30:]!r}, but the words follow {row.text[max(0, start - 30) : start]!r}",
        hint=hint,
    )


def check_layout(row: WrittenRow, indices: Sequence[int]) -> None:
    """Refuse a row of which something is not written, or is written in the midst of a message that is trained.

    Raises:
        LossMaskError: naming what is left out.
    """
    marks = Marks(row.text)
    marked = [mark_everything(message, marks) for message in row.messages]
    tools, names = mark_tools(row.tools, marks) if row.tools else ("", [])
    text = row.write(([message for message, _ in marked], tools))
    if any(name not in text for name in names):
        raise _left_out("tools")
    for index, (message, (_, parts)) in enumerate(zip(row.messages, marked, strict=True)):
        missing = [part for part in parts if part.mark not in text]
        if missing and message.role != "assistant":
            which = {"tool": "tool messages", "system": "the system message"}
            raise _left_out(which.get(message.role, f"the words of message {index + 1} ({message.role})"))
        if missing and index in indices:
            raise _left_out(f"the {missing[0].kind} {missing[0].text[:60]!r} of message {index + 1}")
    for index in indices:
        own = {part.mark for part in marked[index][1]}
        places = [text.index(mark) for mark in own]
        inside = text[min(places) : max(places)]
        for number, (_, parts) in enumerate(marked, start=1):
            if any(part.mark in inside for part in parts if part.mark not in own):
                raise LossMaskError(f"the chat template writes message {number} in the midst of message {index + 1}")


def _left_out(what: str) -> LossMaskError:
    return LossMaskError(f"the chat template does not write {what}", hint=ANOTHER_TEMPLATE)


def find_parts(text: str, rendered: str, parts: Sequence[Part], *, message: str) -> tuple[int, int]:
    """Return where the first part starts and the last one ends in the text.

    The text must be the marked one with each part in the place of its mark; only blanks around a part may be gone.

    Args:
        text: the row as the template writes it.
        rendered: the same with the marks in place of the parts.
        parts: what the marks stand for.
        message: what to call the message in an error.

    Raises:
        LossMaskError: a part is not in the text, is there twice, or the template changes it.
    """
    for part in parts:
        count = rendered.count(part.mark)
        if part.kind == CALL and count == 0:
            raise LossMaskError(f"the chat template does not write the tool calls of {message}")
        if part.kind != CALL and count != 1:
            raise LossMaskError(f"the chat template writes the {part.kind} of {message} not exactly once")
    ordered = sorted(parts, key=lambda part: rendered.index(part.mark))
    rest, pieces = rendered, []
    for part in ordered:
        piece, _, rest = rest.partition(part.mark)
        pieces.append(piece)
    # A template may name the called function again, after the call or inside it.
    pieces = [unmark(piece, parts) for piece in [*pieces, rest]]
    start, position = len(pieces[0]), len(pieces[0])
    stop = len(text) - len(pieces[-1])
    if not text.startswith(pieces[0]) or not text.endswith(pieces[-1]):
        raise LossMaskError(f"the chat template rewrites {message}: other words change what stands around them")
    for part, piece in zip(ordered, pieces[1:], strict=True):
        last = part is ordered[-1]
        after = _after_words(text, _skip_blanks(text, position), part.text.strip(), "" if last else piece)
        if after is None or after > stop or (last and text[after:stop].strip()):
            raise LossMaskError(
                f"the chat template rewrites {message}: its {part.kind} {part.text[:60]!r} is not in what it writes"
            )
        position = after
    return start, stop


def _after_words(text: str, position: int, words: str, piece: str) -> int | None:
    """Return where the text goes on after these words, blanks, and the piece; None if it is another text."""
    if not text.startswith(words, position):
        return None
    position += len(words)
    while not text.startswith(piece, position):
        if not text[position : position + 1].isspace():
            return None
        position += 1
    return position + len(piece)


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def plain_turn_end(after: str, other: str | None, control: Sequence[str]) -> tuple[int, int] | None:
    """Return how many characters after the words belong to the turn and how many of them end it; None: nothing ends it.

    Args:
        after: what the template writes after the words.
        other: what it writes after them once the conversation goes on (or stops there), where that is known.
        control: every special token.

    The end is the control token after the words. Those that follow it without a gap belong to the turn where both agree
    on them: a single end-of-text at the very end of the row does not.
    """
    first = _token_at(control)
    common = after[: agreement(after, other)] if other is not None else ""
    agreed = first(common, len(common) - len(common.lstrip())) != ""
    after = common if agreed else after
    blanks = len(after) - len(after.lstrip())
    token = first(after, blanks)
    if not token:
        return None
    position = blanks + len(token)
    while agreed and (following := first(after, position)):
        position += len(following)
    return position, position


def calling_turn_end(after: str, other: str | None, control: Sequence[str]) -> tuple[int, int] | None:
    """Return the same for a message that calls tools: the last control token that is written whatever follows ends it.

    Markers inside a call may be control tokens themselves; what belongs to the next turn is not common to both.
    """
    common = after[: agreement(after, other)] if other is not None else after
    last = None
    for last in control_pattern(tuple(control)).finditer(common):  # noqa: B007
        pass
    return (last.end(), len(last.group())) if last is not None else None


def _token_at(control: Sequence[str]) -> Callable[[str, int], str]:
    pattern = control_pattern(tuple(control))

    def token(text: str, position: int) -> str:
        found = pattern.match(text, position)
        return found.group() if found else ""

    return token


@lru_cache(maxsize=16)
def control_pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    """Return what matches any of the control tokens, the longest first."""
    longest = sorted(filter(None, control), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def agreement(first: str, second: str) -> int:
    """Return how many characters the two have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low
