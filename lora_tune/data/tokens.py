"""Conversation → input_ids and labels for any chat template. The loss mask lives here and only here.

No template markers are needed: where a message's words stand is found by rendering the conversation twice with
different words in their place and looking at what differs. Each row is then proved, or refused: what is trained follows
exactly the prompt that the model is given when it is used, and reads exactly as the message, then the end-of-turn.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lora_tune.data.messages import Conversation, Message
from lora_tune.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that adds nothing to the loss (PyTorch's and transformers' convention)."""

TEMPLATE_DATE = "26 Jul 2024"
"""What templates that write today's date are told (Llama 3.x's own default): the same rows give the same tokens."""

_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    f"{{%- if format == '%Y-%m-%d' -%}}2024-07-26{{%- else -%}}{TEMPLATE_DATE}{{%- endif -%}}"
    "{%- endmacro -%}"
)

_MARKS = ("x7f3a9", "k2c8d1")
"""Two stand-ins for a message's words, with no first or last character in common."""

_SETTINGS: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
"""Ways to ask a template for an answer without reasoning; the first one under which prompt and answer agree is taken."""


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


@dataclass(frozen=True)
class _Span:
    """What the model must write for one message, as [start, end) in the rendered text."""

    start: int
    end: int
    ender: int
    """How many of its last characters end the turn."""


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
    """Return the messages as the chat template writes them, with the settings that suit the template.

    Raises:
        LossMaskError: the template refuses these messages, or the tokenizer has no template.
    """
    return _render(tokenizer, messages, _settings(tokenizer), add_generation_prompt=add_generation_prompt)


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids, [T], after which the assistant's answer begins: what the model is given when it is used."""
    return _encode(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def answer_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """Return the token ids, [A], of the perfect answer to the conversation's last turn, without its end-of-turn."""
    text = render(tokenizer, conversation.messages)
    span = _span(tokenizer, conversation.messages, len(conversation.messages) - 1, text)
    whole = _encode(tokenizer, text[: span.start])
    return _encode(tokenizer, text[: span.end - span.ender])[len(whole) :]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the id that ends the assistant's turn in this template, as a list; generation stops there."""
    messages = [Message("user", "a"), Message("assistant", "b")]
    text = render(tokenizer, messages)
    span = _span(tokenizer, messages, 1, text)
    return _encode(tokenizer, text[: span.end])[-1:]


def tokenize(conversation: Conversation, tokenizer: Any, *, train_on: str) -> TokenizedRow:
    """Return the conversation's tokens and which of them are trained, at full length.

    Args:
        conversation: the row.
        tokenizer: a fast tokenizer with a chat template.
        train_on: `assistant` (every assistant message), `completion` (those of the completion) or `all`.

    Raises:
        LossMaskError: the trained tokens cannot be proved to be the words of the messages and their end-of-turn.
    """
    _refuse_control_tokens(conversation, special_tokens(tokenizer))
    text = render(tokenizer, conversation.messages)
    spans: list[_Span] = []
    if train_on != "all":
        trained = conversation.trained_messages(train_on)
        spans = [_span(tokenizer, conversation.messages, i, text) for i in trained]
    ids, owners = _encode_spans(tokenizer, text, spans)
    _prove(tokenizer, text, spans, ids, owners)
    on = [True] * len(ids) if train_on == "all" else [owner is not None for owner in owners]
    row = TokenizedRow(tuple(ids), tuple(on), conversation.where)
    loss_labels(row.input_ids, row.trained)
    return row


def trained_text(row: TokenizedRow, tokenizer: Any) -> str:
    """Return the trained tokens as text, special tokens included."""
    return _decode(tokenizer, [token for token, on in zip(row.input_ids, row.trained, strict=True) if on])


def special_tokens(tokenizer: Any) -> list[str]:
    """Return every special token's text: those with a role (eos, bos, …) and those added as special."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *map(str, tokenizer.all_special_tokens)})


def _render(
    tokenizer: Any, messages: Sequence[Message], settings: Mapping[str, Any], *, add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise LossMaskError(
            "the base has no chat template", hint="set data.chat_template to a .jinja file, or to builtin:plain"
        )
    turns = [message.as_dict() for message in messages]
    template = str(tokenizer.chat_template)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=(_FIXED_CLOCK if "strftime_now" in template else "") + template,
            date_string=TEMPLATE_DATE,
            **settings,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as err:
        roles = ", ".join(message.role for message in messages)
        raise LossMaskError(
            f"the chat template refuses the roles {roles}: {err}",
            hint="change the rows, or give a template that takes them in data.chat_template",
        ) from err
    return str(text)


def _settings(tokenizer: Any) -> Mapping[str, Any]:
    """Return the settings under which the generation prompt is the beginning of what the template writes.

    Templates of reasoning models open a thinking block in the prompt that they leave out of the finished turn; trained
    like that, the model would be asked from a state that it never saw.
    """
    messages = [Message("user", "a"), Message("assistant", "b")]
    for settings in _SETTINGS:
        prompt = _render(tokenizer, messages[:1], settings, add_generation_prompt=True)
        if _render(tokenizer, messages, settings, add_generation_prompt=False).startswith(prompt):
            return settings
    return {}


def _refuse_control_tokens(conversation: Conversation, control: Sequence[str]) -> None:
    for number, message in enumerate(conversation.messages, start=1):
        found = next((token for token in control if token in message.content), None)
        if found is not None:
            raise LossMaskError(
                f"message {number} ({message.role}) holds the control token {found}, which would end or begin a turn",
                hint="take control tokens out of the rows",
            )


def _span(tokenizer: Any, messages: Sequence[Message], index: int, text: str) -> _Span:
    """Return what the model must write for message `index`, end-of-turn included."""
    start, end = _words_span(tokenizer, messages, index, text)
    prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
    if len(prompt) > start or not text.startswith(prompt):
        last = index == len(messages) - 1
        raise LossMaskError(
            f"the chat template writes message {index + 1} differently from how it asks for it"
            f"{'' if last else ', once the conversation goes on'}: "
            f"the prompt ends in {prompt[-30:]!r}, but the words follow {text[max(0, start - 30) : start]!r}",
            hint="give another template in data.chat_template" if last else "set data.train_on to completion",
        )
    # What stands between the prompt and the words (an empty thinking block, say) is the model's to write.
    ender = _end_of_turn(tokenizer, messages, index, text, end)
    return _Span(len(prompt), end + ender, ender)


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
    """Return how many characters after the words end the turn: up to and including its end-of-turn tokens."""
    control = special_tokens(tokenizer)
    alone = render(tokenizer, messages[: index + 1])
    after, agreed = text[words_end:], False
    if alone[:words_end] == text[:words_end]:
        # What is written with and without the next message belongs to this turn for sure.
        common = after[: _agreement(after, alone[words_end:])]
        agreed = bool(_first_token(common.lstrip(), control))
        after = common if agreed else after
    position = len(after) - len(after.lstrip())
    first = _first_token(after[position:], control)
    if not first:
        raise LossMaskError(
            "the chat template writes no end-of-turn token after an assistant message, so the model would never learn to stop",
            hint="give a template that ends the assistant's turn in data.chat_template",
        )
    position += len(first)
    while agreed and (following := _first_token(after[position:], control)):
        position += len(following)
    return position


def _first_token(text: str, control: Sequence[str]) -> str:
    """Return the longest control token that the text begins with, or nothing."""
    return max((token for token in control if text.startswith(token)), key=len, default="")


def _agreement(first: str, second: str) -> int:
    """Return how many characters the two have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode_spans(tokenizer: Any, text: str, spans: Sequence[_Span]) -> tuple[list[int], list[int | None]]:
    """Return ids, [T], and for each token which span it belongs to.

    The whole text is tokenized at once, as in use. Where a token would then reach across the start of an answer (an answer
    that begins with a line break, say), the prompt and the answer are tokenized apart, as they are in use.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [int(token) for token in encoded["input_ids"]]
    starts = [start for start, _ in encoded["offset_mapping"]]
    for span in spans:
        before = sum(start < span.start for start in starts)
        if ids[:before] != _encode(tokenizer, text[: span.start]):
            return _encode_apart(tokenizer, text, spans)
    owners = [
        next((n for n, span in enumerate(spans) if span.start <= start < span.end and end > start), None)
        for start, end in encoded["offset_mapping"]
    ]
    return ids, owners


def _encode_apart(tokenizer: Any, text: str, spans: Sequence[_Span]) -> tuple[list[int], list[int | None]]:
    ids: list[int] = []
    owners: list[int | None] = []
    position = 0
    for number, span in enumerate(spans):
        for piece, owner in ((text[position : span.start], None), (text[span.start : span.end], number)):
            tokens = _encode(tokenizer, piece)
            ids += tokens
            owners += [owner] * len(tokens)
        position = span.end
    rest = _encode(tokenizer, text[position:])
    return ids + rest, owners + [None] * len(rest)


def _prove(tokenizer: Any, text: str, spans: Sequence[_Span], ids: Sequence[int], owners: Sequence[int | None]) -> None:
    """Refuse the row unless each span's tokens read exactly as that span of the text."""
    for number, span in enumerate(spans):
        decoded = _decode(tokenizer, [token for token, owner in zip(ids, owners, strict=True) if owner == number])
        wanted = text[span.start : span.end]
        # Tokenizers of SentencePiece kind do not give a first blank back; some write composed characters (NFC).
        if decoded not in (wanted, wanted.removeprefix(" "), unicodedata.normalize("NFC", wanted)):
            raise LossMaskError(
                f"the trained tokens read {decoded[:80]!r}, but the answer is {wanted[:80]!r}: the tokenizer changes its text"
            )
