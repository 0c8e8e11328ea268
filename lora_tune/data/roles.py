"""How many tokens of a row each role says, and how many of them are trained: a count for the lint, not the loss mask."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_tune.data.messages import Message
from lora_tune.data.rendering import Place, Span

Run = tuple[int, int]
"""Neighbouring tokens, as [start, end)."""

RoleCount = tuple[str, int, int]
"""Role, tokens and trained tokens of what one message says."""


@dataclass(frozen=True)
class SaidRow:
    """A row's text, and where in it the messages stand."""

    messages: Sequence[Message]

    text: str
    """The row as the template writes it."""

    places: Mapping[int, Place]
    """Where each message's words stand, by message, as far as that is known."""

    spans: Mapping[int, tuple[Span, Run]]
    """What is trained, by message: in the text and in the tokens."""


def role_counts(row: SaidRow, kept: Sequence[Run], *, token_at: Callable[[int], int | None]) -> tuple[RoleCount, ...]:
    """Return role, tokens and trained tokens of each message whose place is known.

    A trained message counts with all that the model must write for it but the end-of-turn; any other with its words. No
    token is counted twice.

    Args:
        row: where the messages stand.
        kept: the trained tokens.
        token_at: the token that holds a character of the text.
    """
    counted = []
    for index, message in enumerate(row.messages):
        tokens = _trained_tokens(row, index, token_at) if index in row.spans else _words(row, index, token_at)
        if tokens is not None:
            counted.append((tokens[0], tokens[1], message.role))
    found, position = [], 0
    for first, end, role in sorted(counted):
        start = max(first, position)
        if start < end:
            found.append((role, end - start, sum(max(0, min(end, b) - max(start, a)) for a, b in kept)))
            position = end
    return tuple(found)


def _trained_tokens(row: SaidRow, index: int, token_at: Callable[[int], int | None]) -> Run | None:
    span, (first, last) = row.spans[index]
    ender = token_at(span.end - span.ender) if span.ender else None
    return (first, ender if ender is not None and first <= ender <= last else last)


def _words(row: SaidRow, index: int, token_at: Callable[[int], int | None]) -> Run | None:
    start, end = row.places.get(index, (0, 0))
    words = row.text[start:end]
    if not words.strip():
        return None
    first = token_at(start + len(words) - len(words.lstrip()))
    last = token_at(start + len(words.rstrip()) - 1)
    return None if first is None or last is None else (first, last + 1)
