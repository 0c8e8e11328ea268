"""Conversation → input_ids and labels for any chat template. The loss mask lives here and only here.

No template markers are needed: where a message's words stand is found by rendering the conversation twice with
different words in their place and looking at what differs. Each row is then proved: its trained tokens, decoded, are
the message's words and the end-of-turn token, or the row is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lora_tune.data.messages import Conversation, Message
from lora_tune.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that adds nothing to the loss (PyTorch's and transformers' convention)."""

_MARKS = ("x7f3a9", "k2c8d1")
"""Two stand-ins for a message's words, with no first or last character in common."""


class LossMaskError(DataError):
    """It cannot be said for certain which tokens of a row are trained."""


@dataclass(frozen=True)
class TokenizedRow:
    """One conversation as tokens."""

    input_ids: tuple[int, ...]
    """Token ids, [T]."""

    trained: tuple[bool, ...]
    """Loss mask, [T]; True means the token adds to the loss."""

    where: str
    """`file:line` of the row."""

    @property
    def n_trained(self) -> int:
        """Count of trained tokens."""
        return sum(self.trained)


def loss_labels(ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """Return the token id where trained, IGNORE_INDEX elsewhere, [T].

    The model shifts labels by one itself; do not shift here.

    Raises:
        LossMaskError: the lengths differ, or no token is trained.

    Source: observed with trl 1.16: `input_ids` and `labels` given together reach the model untouched
        (tests/integration/test_trl_keeps_labels.py).
    """
    if len(ids) != len(trained):
        raise LossMaskError(f"{len(ids)} tokens, but the loss mask has {len(trained)} entries")
    if not any(trained):
        raise LossMaskError("no token is trained")
    return [token if on else IGNORE_INDEX for token, on in zip(ids, trained, strict=True)]


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """Return the messages as the chat template writes them.

    Raises:
        LossMaskError: the template refuses these messages, or the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise LossMaskError(
            "the base has no chat template", hint="set data.chat_template to a .jinja file, or to builtin:plain"
        )
    turns = [message.as_dict() for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError, ValueError) as err:
        roles = ", ".join(message.role for message in messages)
        raise LossMaskError(
            f"the chat template refuses the roles {roles}: {err}",
            hint="change the rows, or give a template that takes them in data.chat_template",
        ) from err
    return str(text)


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids, [T], after which the assistant's answer begins: what the model is given when it is used."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def tokenize(conversation: Conversation, tokenizer: Any, *, train_on: str) -> TokenizedRow:
    """Return the conversation's tokens and which of them are trained, at full length.

    Args:
        conversation: the row.
        tokenizer: a fast tokenizer with a chat template.
        train_on: `assistant` (every assistant message), `completion` (those of the completion) or `all`.

    Raises:
        LossMaskError: the trained tokens cannot be proved to be the words of the messages and their end-of-turn.
    """
    text = render(tokenizer, conversation.messages)
    if train_on == "all":
        spans = [(0, len(text))]
    else:
        spans = [
            _answer_span(tokenizer, conversation.messages, i, text) for i in conversation.trained_messages(train_on)
        ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [int(token) for token in encoded["input_ids"]]
    owner = [_span_of(start, end, spans) for start, end in encoded["offset_mapping"]]
    if train_on != "all":
        _prove(tokenizer, text, spans, ids, owner)
    row = TokenizedRow(tuple(ids), tuple(span is not None for span in owner), conversation.where)
    loss_labels(row.input_ids, row.trained)
    return row


def trained_text(row: TokenizedRow, tokenizer: Any) -> str:
    """Return the trained tokens as text, special tokens included."""
    kept = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _answer_span(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
    """Return [start, end) in `text` of what the model must write for message `index`, end-of-turn included."""
    words_start, words_end = _words_span(tokenizer, messages, index, text)
    prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
    # What stands between the generation prompt and the words (an empty thinking block, say) is the model's to write.
    start = len(prompt) if len(prompt) <= words_start and text.startswith(prompt) else words_start
    return start, words_end + _end_of_turn(tokenizer, messages, index, text, words_end)


def _words_span(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
    first, second = (
        render(tokenizer, [*messages[:index], Message(messages[index].role, mark), *messages[index + 1 :]])
        for mark in _MARKS
    )
    start = _agreement(first, second)
    tail = _agreement(first[::-1], second[::-1])
    if first[start : len(first) - tail] != _MARKS[0]:
        raise LossMaskError(f"the chat template writes message {index + 1} not exactly once")
    end = len(text) - tail
    surroundings_agree = text[:start] == first[:start] and text[end:] == first[len(first) - tail :]
    if not surroundings_agree or text[start:end].strip() != messages[index].content.strip():
        raise LossMaskError(
            f"the chat template rewrites message {index + 1}: {messages[index].content[:60]!r} is not in what it writes"
        )
    return start, end


def _end_of_turn(tokenizer: Any, messages: Sequence[Message], index: int, text: str, words_end: int) -> int:
    """Return how many characters after the words end the turn: up to and including the end-of-turn token."""
    alone = render(tokenizer, messages[: index + 1])
    after = text[words_end:]
    if alone[:words_end] == text[:words_end]:
        # Without the next message: what follows here belongs to this turn for sure.
        after = after[: _agreement(after, alone[words_end:])]
    blank = len(after) - len(after.lstrip())
    enders = [str(token) for token in special_tokens(tokenizer) if after[blank:].startswith(str(token))]
    if not enders:
        raise LossMaskError(
            "the chat template writes no end-of-turn token after an assistant message, so the model would never learn to stop",
            hint="give a template that ends the assistant's turn in data.chat_template",
        )
    return blank + max(len(token) for token in enders)


def _agreement(first: str, second: str) -> int:
    """Return how many characters the two have in common at their start."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def special_tokens(tokenizer: Any) -> list[str]:
    """Return every special token's text: those with a role (eos, bos, …) and those added as special."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *map(str, tokenizer.all_special_tokens)})


def _span_of(start: int, end: int, spans: Sequence[tuple[int, int]]) -> int | None:
    if end <= start:
        return None
    return next((i for i, (first, last) in enumerate(spans) if first <= start < last), None)


def _prove(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], ids: Sequence[int], owner: Sequence[int | None]
) -> None:
    """Refuse the row unless each span's tokens decode to exactly that span of the text."""
    for number, (start, end) in enumerate(spans):
        kept = [token for token, span in zip(ids, owner, strict=True) if span == number]
        decoded = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded.strip() != text[start:end].strip():
            raise LossMaskError(
                f"the trained tokens read {decoded[:80]!r}, but the answer is {text[start:end][:80]!r}; "
                "a token reaches across the start or the end of the answer, or the tokenizer changes its text"
            )
