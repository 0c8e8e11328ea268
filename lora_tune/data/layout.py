"""What a chat template writes around the words, learnt once per order of roles: most rows then need no search.

A layout is a guess until a row's own rendering equals it, character for character; tokens.py falls back to the search by
rendering differences (rendering.py) where it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.data.messages import Conversation, Message
from lora_tune.data.rendering import LossMaskError, Span, answer_spans, render, special_tokens

Shape = tuple[str, ...]
"""The roles of a conversation in order; only conversations of plain messages have a layout."""


@dataclass(frozen=True)
class Answer:
    """How far around its words the model's part of one message reaches."""

    before: int
    """Characters before the words that the model must write."""

    after: int
    """Characters after the words that it must write, end-of-turn included."""

    ender: int
    """How many of those end the turn."""

    lead: tuple[int, ...] | None
    """Token ids from the last control token before the answer up to it; None where no control token stands there."""


@dataclass(frozen=True)
class Layout:
    """The literal text around each message's words, and what of it belongs to each answer."""

    pieces: tuple[str, ...]
    """Text before the first words, between each two, and after the last: one more than there are messages."""

    stripped: tuple[bool, ...]
    """Per message: the template takes the blanks around its words away."""

    answers: dict[int, Answer]
    """By message; a message that the template writes otherwise than it asks for it has none."""

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[int], list[int]]:
        """Return the text that these messages would be, and where each one's words start and end."""
        parts, starts, ends = [self.pieces[0]], [], []
        position = len(self.pieces[0])
        for message, stripped, piece in zip(messages, self.stripped, self.pieces[1:], strict=True):
            words = message.content.strip() if stripped else message.content
            starts.append(position)
            position += len(words)
            ends.append(position)
            parts += (words, piece)
            position += len(piece)
        return "".join(parts), starts, ends


def shape_of(conversation: Conversation) -> Shape | None:
    """Return the conversation's shape, or None where it holds more than plain words."""
    if conversation.tools or not all(message.is_plain for message in conversation.messages):
        return None
    return tuple(message.role for message in conversation.messages)


def learn_layout(tokenizer: Any, shape: Shape) -> Layout | None:
    """Return the layout of conversations of this shape, or None where the template has none."""
    marks = [f"w{number}q7" for number in range(len(shape))]
    marked = Conversation(
        tuple(Message(role, f" {mark} ") for role, mark in zip(shape, marks, strict=True)), len(shape) - 1, ""
    )
    try:
        text = render(tokenizer, marked.messages)
    except LossMaskError:
        return None
    pieces, stripped, position = [], [], 0
    for mark in marks:
        padded = f" {mark} "
        kept = padded in text
        start = text.find(padded if kept else mark, position)
        if start < 0 or text.count(mark) != 1:
            return None
        pieces.append(text[position:start])
        stripped.append(not kept)
        position = start + len(padded if kept else mark)
    pieces.append(text[position:])
    layout = Layout(tuple(pieces), tuple(stripped), {})
    filled, starts, ends = layout.fill(marked.messages)
    if filled != text:
        return None
    indices = [index for index, role in enumerate(shape) if role == "assistant"]
    for index, span in _spans(tokenizer, marked, indices).items():
        lead = lead_of(tokenizer, text, span, words=(" w", "q7"))
        layout.answers[index] = Answer(starts[index] - span.start, span.end - ends[index], span.ender, lead)
    return layout


def _spans(tokenizer: Any, marked: Conversation, indices: Sequence[int]) -> dict[int, Span]:
    """Return the span of each message that has one; all are asked for at once, which nearly every template allows."""
    try:
        return dict(zip(indices, answer_spans(tokenizer, marked, indices)[1], strict=True))
    except LossMaskError:
        if len(indices) < 2:
            return {}
    return {i: span for index in indices for i, span in _spans(tokenizer, marked, [index]).items()}


def lead_of(tokenizer: Any, text: str, span: Span, *, words: Sequence[str] = ()) -> tuple[int, ...] | None:
    """Return the token ids from the last control token before the span up to it.

    Control tokens part a text for the tokenizer, so what stands before the last one cannot change what follows it.

    Args:
        tokenizer: a fast tokenizer.
        text: the row as the template writes it.
        span: the answer.
        words: None is returned where one of these stands after the control token.
    """
    before = text[: span.start]
    place, token = max(((before.rfind(token), token) for token in special_tokens(tokenizer)), default=(-1, ""))
    if place < 0 or not token or any(word in before[place:] for word in words):
        return None
    return tuple(tokenizer(before[place:], add_special_tokens=False)["input_ids"])
