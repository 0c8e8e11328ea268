"""Rows → input_ids and the loss mask, each row proved or refused. The loss mask lives here and only here.

What is trained follows exactly the prompt that the model is given when it is used, and reads exactly as the message, then
the end-of-turn; where each answer stands in the text comes from rendering.py, or from a layout that the row's own
rendering confirms.
"""

from collections.abc import Sequence
from typing import Any

from lora_tune.data.encoding import Draft, EncodedRow, RowEncoder, TokenizedRow
from lora_tune.data.layout import Layout, Shape, learn_layout, shape_of
from lora_tune.data.messages import Conversation, Message, PlainText
from lora_tune.data.rendering import (
    LossMaskError,
    Span,
    answer_spans,
    control_normalizer,
    refuse_control_tokens,
    render,
    render_many,
    special_tokens,
    written_row,
)

__all__ = [
    "IGNORE_INDEX",
    "EncodedRow",
    "RowTokenizer",
    "TokenizedRow",
    "answer_ids",
    "end_of_turn_ids",
    "loss_labels",
    "prompt_ids",
    "tokenize",
    "trained_text",
]

IGNORE_INDEX = -100
"""Label of a token that adds nothing to the loss (PyTorch's and transformers' convention)."""


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


def prompt_ids(tokenizer: Any, messages: Sequence[Message], *, tools: str = "") -> list[int]:
    """Return the token ids, [T], after which the assistant's answer begins: what the model is given when it is used."""
    return _encode(tokenizer, render(tokenizer, messages, tools=tools, add_generation_prompt=True))


def answer_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """Return the token ids, [A], of the perfect answer to the conversation's last turn, without its end-of-turn."""
    text, (span,) = answer_spans(tokenizer, conversation, [len(conversation.messages) - 1])
    whole = _encode(tokenizer, text[: span.start])
    return _encode(tokenizer, text[: span.end - span.ender])[len(whole) :]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the id that ends the assistant's turn in this template, as a list; generation stops there."""
    turn = Conversation((Message("user", "a"), Message("assistant", "b")), 1, "")
    text, (span,) = answer_spans(tokenizer, turn, [1])
    return _encode(tokenizer, text[: span.end])[-1:]


def tokenize(row: Conversation | PlainText, tokenizer: Any, *, train_on: str) -> TokenizedRow:
    """Return the row's tokens and which of them are trained, at full length.

    Args:
        row: the row; a plain text is trained whole, with the tokenizer's own first token and an end-of-text.
        tokenizer: a fast tokenizer with a chat template.
        train_on: `assistant` (every assistant message), `last_assistant`, `completion` (those of it) or `all`.

    Raises:
        LossMaskError: the trained tokens cannot be proved to be the words of the messages and their end-of-turn.
    """
    (found,) = RowTokenizer(tokenizer, train_on=train_on)([row])
    if isinstance(found, LossMaskError):
        raise found
    return found.as_row(row.where)


def trained_text(row: TokenizedRow, tokenizer: Any) -> str:
    """Return the trained tokens as text, special tokens included."""
    kept = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


MAX_MESSAGES = 1_000
"""Messages a row: each answer's prompt is written out, so the time grows with the square of them."""


class RowTokenizer:
    """Tokenizes rows in batches and keeps what it has learnt of the template."""

    def __init__(self, tokenizer: Any, *, train_on: str) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._encoder = RowEncoder(tokenizer, train_on=train_on)
        self._control = special_tokens(tokenizer)
        self._normalize = control_normalizer(tokenizer)
        self._layouts: dict[Shape, Layout | None] = {}

    def __call__(self, rows: Sequence[Conversation | PlainText]) -> list[EncodedRow | LossMaskError]:
        """Return each row's tokens, or why it is refused, in the same order."""
        return self.encode(self.draft(rows))

    def draft(self, rows: Sequence[Conversation | PlainText]) -> list[Draft]:
        """Return the rows as text, with the spans that are trained: the part that needs no tokenizer."""
        drafts = [Draft(row, self._indices(row), found=_too_many(row)) for row in rows]
        likely = [
            draft
            for draft in drafts
            if draft.found is None and isinstance(draft.row, Conversation) and self._layout(draft.row) is not None
        ]
        self._draft_by_layout(likely)
        for draft in drafts:
            if not draft.text and draft.found is None:
                self._draft_alone(draft)
        return drafts

    def encode(self, drafts: Sequence[Draft]) -> list[EncodedRow | LossMaskError]:
        """Return the drafts' tokens, proved, or why they are refused."""
        return self._encoder.encode(drafts)

    def _layout(self, conversation: Conversation) -> Layout | None:
        shape = shape_of(conversation)
        if shape is None:
            return None
        if shape not in self._layouts:
            self._layouts[shape] = learn_layout(self.tokenizer, shape)
        return self._layouts[shape]

    def _indices(self, row: Conversation | PlainText) -> list[int]:
        """Return the messages that are trained; with train_on `all`, the answers that are not."""
        if isinstance(row, PlainText):
            return []
        if self.train_on == "all":
            return [i for i, said in enumerate(row.messages) if said.role == "assistant" and said.train is False]
        return row.trained_messages(self.train_on)

    def _draft_by_layout(self, drafts: Sequence[Draft]) -> None:
        """Fill in the drafts whose own rendering, and every prompt in it, equals the layout; leave the others alone."""
        asked: list[tuple[Sequence[Message], str]] = [(draft.row.messages, "") for draft in drafts]  # type: ignore[union-attr]
        texts = _render_each(self.tokenizer, asked)
        prompts: list[tuple[Sequence[Message], str]] = []
        guesses = []
        for draft, text in zip(drafts, texts, strict=True):
            conversation = draft.row
            assert isinstance(conversation, Conversation)
            layout = self._layout(conversation)
            assert layout is not None
            filled, starts, ends = layout.fill(conversation.messages)
            indices = draft.indices
            if text is None or filled != text or any(index not in layout.answers for index in indices):
                continue
            answers = [layout.answers[index] for index in indices]
            spans = [
                Span(starts[i] - a.before, ends[i] + a.after, a.ender) for i, a in zip(indices, answers, strict=True)
            ]
            prompts += [(conversation.messages[:index], "") for index in indices]
            places = dict(enumerate(zip(starts, ends, strict=True)))
            guesses.append((draft, text, spans, [answer.lead for answer in answers], places))
        rendered = iter(_render_each(self.tokenizer, prompts, add_generation_prompt=True))
        for draft, text, spans, leads, places in guesses:
            agree = [text[: span.start] == next(rendered) for span in spans]
            if not all(agree):
                continue
            try:
                self._refuse(draft)
            except LossMaskError as err:
                draft.found = err
            else:
                draft.text, draft.spans, draft.leads, draft.places = text, spans, leads, places

    def _draft_alone(self, draft: Draft) -> None:
        row = draft.row
        try:
            if isinstance(row, PlainText):
                draft.text = row.text
                return
            self._refuse(draft)
            draft.text, draft.spans, draft.places = written_row(self.tokenizer, row, draft.indices)
            draft.leads = [None] * len(draft.spans)
        except LossMaskError as err:
            draft.found = err

    def _refuse(self, draft: Draft) -> None:
        assert isinstance(draft.row, Conversation)
        refuse_control_tokens(draft.row, self._control, normalize=self._normalize)
        if self.train_on != "all" and not draft.indices:
            raise LossMaskError(
                "no token is trained", hint="no assistant message of the row is trained: see data.train_on"
            )


def _too_many(row: Conversation | PlainText) -> LossMaskError | None:
    if isinstance(row, PlainText) or len(row.messages) <= MAX_MESSAGES:
        return None
    return LossMaskError(
        f"the row has {len(row.messages):,} messages; at most {MAX_MESSAGES:,} are taken",
        hint="part long conversations into several rows",
    )


def _render_each(
    tokenizer: Any, asked: Sequence[tuple[Sequence[Message], str]], *, add_generation_prompt: bool = False
) -> list[str | None]:
    """Return what the template writes for each, None where it refuses."""
    texts: list[str | None] = []
    while len(texts) < len(asked):
        rest = asked[len(texts) :]
        try:
            texts += render_many(tokenizer, rest, add_generation_prompt=add_generation_prompt)
        except LossMaskError as err:
            refused = err.row or 0
            texts += render_many(tokenizer, rest[:refused], add_generation_prompt=add_generation_prompt)
            texts.append(None)
    return texts


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
