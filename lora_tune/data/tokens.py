"""Rows → input_ids and the loss mask, each row proved or refused. The loss mask lives here and only here.

What is trained follows exactly the prompt that the model is given when it is used, and reads exactly as the message, then
the end-of-turn; where each answer stands in the text comes from rendering.py, or from a layout that the row's own
rendering confirms.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.data.layout import Layout, Shape, learn_layout, shape_of
from lora_tune.data.messages import Conversation, Message, PlainText
from lora_tune.data.rendering import (
    LossMaskError,
    Span,
    answer_spans,
    refuse_control_tokens,
    render,
    render_many,
    special_tokens,
)

IGNORE_INDEX = -100
"""Label of a token that adds nothing to the loss (PyTorch's and transformers' convention)."""

Run = tuple[int, int]
"""Neighbouring trained tokens, as [start, end)."""


@dataclass(frozen=True)
class TokenizedRow:
    """One row as tokens."""

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
class EncodedRow:
    """One row's tokens in little room, with what the lint says of them."""

    ids: list[int]
    """Token ids, [T]."""

    runs: tuple[Run, ...]
    """The trained tokens, one run an answer."""

    roles: tuple[tuple[str, int, int], ...]
    """Role, tokens and trained tokens of each message's words; what the template adds is in none of them."""

    def as_row(self, where: str) -> TokenizedRow:
        """The row with its loss mask token by token."""
        trained = [False] * len(self.ids)
        for start, end in self.runs:
            trained[start:end] = [True] * (end - start)
        return TokenizedRow(tuple(self.ids), tuple(trained), where)


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


@dataclass
class _Draft:
    """A row on its way: text and spans are known, its tokens not yet."""

    row: Conversation | PlainText
    indices: Sequence[int]
    """The messages that are trained."""
    text: str = ""
    spans: Sequence[Span] = ()
    leads: Sequence[tuple[int, ...] | None] = ()
    """Per span: the ids that must stand right before it; None asks for the whole prompt's."""
    words: Sequence[tuple[int, int, int]] = ()
    """Message, start and end of the words that were found in the text."""
    found: EncodedRow | LossMaskError | None = None


class RowTokenizer:
    """Tokenizes rows in batches and keeps what it has learnt of the template."""

    def __init__(self, tokenizer: Any, *, train_on: str) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may bring its own limits; a call of the tokenizer switches them off, and so do we.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = special_tokens(tokenizer)
        self._layouts: dict[Shape, Layout | None] = {}

    def __call__(self, rows: Sequence[Conversation | PlainText]) -> list[EncodedRow | LossMaskError]:
        """Return each row's tokens, or why it is refused, in the same order."""
        return self.encode(self.draft(rows))

    def draft(self, rows: Sequence[Conversation | PlainText]) -> list[_Draft]:
        """Return the rows as text, with the spans that are trained: the part that needs no tokenizer."""
        drafts = [_Draft(row, self._indices(row)) for row in rows]
        likely = [d for d in drafts if isinstance(d.row, Conversation) and self._layout(d.row) is not None]
        self._draft_by_layout(likely)
        for draft in drafts:
            if not draft.text and draft.found is None:
                self._draft_alone(draft)
        return drafts

    def encode(self, drafts: Sequence[_Draft]) -> list[EncodedRow | LossMaskError]:
        """Return the drafts' tokens, proved, or why they are refused."""
        ready = [draft for draft in drafts if draft.found is None]
        # As in a call of the tokenizer, but thousands at a time and on every core.
        encodings = self._backend.encode_batch([draft.text for draft in ready], add_special_tokens=False)
        proofs: list[tuple[_Draft, Any, list[Run]]] = []
        for draft, encoding in zip(ready, encodings, strict=True):
            runs = self._runs(draft, encoding) if isinstance(draft.row, Conversation) else None
            if runs is None:
                draft.found = self._encode_alone(draft)
            else:
                proofs.append((draft, encoding, runs))
        self._prove(proofs)
        return [draft.found for draft in drafts if draft.found is not None]

    def _layout(self, conversation: Conversation) -> Layout | None:
        shape = shape_of(conversation)
        if shape is None:
            return None
        if shape not in self._layouts:
            self._layouts[shape] = learn_layout(self.tokenizer, shape)
        return self._layouts[shape]

    def _indices(self, row: Conversation | PlainText) -> list[int]:
        return [] if self.train_on == "all" or isinstance(row, PlainText) else row.trained_messages(self.train_on)

    def _draft_by_layout(self, drafts: Sequence[_Draft]) -> None:
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
            words = [(i, start, end) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
            guesses.append((draft, text, spans, [answer.lead for answer in answers], words))
        rendered = iter(_render_each(self.tokenizer, prompts, add_generation_prompt=True))
        for draft, text, spans, leads, words in guesses:
            agree = [text[: span.start] == next(rendered) for span in spans]
            if not all(agree):
                continue
            try:
                self._refuse(draft)
            except LossMaskError as err:
                draft.found = err
            else:
                draft.text, draft.spans, draft.leads, draft.words = text, spans, leads, words

    def _draft_alone(self, draft: _Draft) -> None:
        row = draft.row
        try:
            if isinstance(row, PlainText):
                draft.text = row.text
                return
            self._refuse(draft)
            draft.text, draft.spans = answer_spans(self.tokenizer, row, draft.indices)
            draft.leads = [None] * len(draft.spans)
            draft.words = _find_words(row, draft.text)
        except LossMaskError as err:
            draft.found = err

    def _refuse(self, draft: _Draft) -> None:
        assert isinstance(draft.row, Conversation)
        refuse_control_tokens(draft.row, self._control)
        if self.train_on != "all" and not draft.indices:
            raise LossMaskError(
                "no token is trained", hint="no assistant message of the row is trained: see data.train_on"
            )

    def _runs(self, draft: _Draft, encoding: Any) -> list[Run] | None:
        """Return each span's tokens, or None where a token reaches across an edge, or the prompt's tokens would change."""
        ids, runs = encoding.ids, []
        for span, lead in zip(draft.spans, draft.leads, strict=True):
            first = encoding.char_to_token(span.start)
            last = encoding.char_to_token(span.end) if span.end < len(draft.text) else len(ids)
            if first is None or last is None or encoding.token_to_chars(first)[0] != span.start:
                return None
            if last < len(ids) and encoding.token_to_chars(last)[0] != span.end:
                return None
            before = _encode(self.tokenizer, draft.text[: span.start]) if lead is None else list(lead)
            if ids[first - len(before) : first] != before or (lead is None and len(before) != first):
                return None
            runs.append((first, last))
        return runs

    def _prove(self, proofs: Sequence[tuple[_Draft, Any, list[Run]]]) -> None:
        """Refuse the rows in which a span's tokens do not read exactly as that span of the text."""
        pieces = [encoding.ids[start:end] for _, encoding, runs in proofs for start, end in runs]
        decoded = iter(self._backend.decode_batch(pieces, skip_special_tokens=False))
        for draft, encoding, runs in proofs:
            wrong = [
                _misread(next(decoded), draft.text[span.start : span.end])
                for span, _ in zip(draft.spans, runs, strict=True)
            ]
            refused = next((err for err in wrong if err is not None), None)
            if refused is not None:
                draft.found = refused
                continue
            kept = [(0, len(encoding.ids))] if self.train_on == "all" else runs
            whole = [(0, len(draft.text), 0, encoding)]
            draft.found = EncodedRow(encoding.ids, tuple(kept), _roles(draft, whole, kept))

    def _encode_alone(self, draft: _Draft) -> EncodedRow | LossMaskError:
        """Tokenize prompt and answers apart, as in use: an answer may begin with a line break, say."""
        if isinstance(draft.row, PlainText):
            return self._encode_text(draft.row)
        ids: list[int] = []
        runs: list[Run] = []
        pieces: list[tuple[int, int, int, Any]] = []
        position = 0
        for start, end, trained in _pieces(draft):
            encoding = self._backend.encode(draft.text[start:end], add_special_tokens=False)
            if trained:
                decoded = self._backend.decode(encoding.ids, skip_special_tokens=False)
                wrong = _misread(decoded, draft.text[start:end])
                if wrong is not None:
                    return wrong
                runs.append((position, position + len(encoding.ids)))
            pieces.append((start, end, position, encoding))
            position += len(encoding.ids)
            ids += encoding.ids
        kept = [(0, len(ids))] if self.train_on == "all" else runs
        return EncodedRow(ids, tuple(kept), _roles(draft, pieces, kept))

    def _encode_text(self, row: PlainText) -> EncodedRow | LossMaskError:
        """A text as it stands: at most one beginning-of-text, then exactly one end-of-text, which is trained."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [int(token) for token in self.tokenizer(row.text)["input_ids"]]
        while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            del ids[0]
        if eos is None:
            return LossMaskError("the tokenizer has no end-of-text token, so the model would never learn to stop")
        while ids and ids[-1] == eos:
            del ids[-1]
        if not ids:
            return LossMaskError("the text is empty")
        ids.append(eos)
        return EncodedRow(ids, ((0, len(ids)),), (("text", len(ids), len(ids)),))


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


def _pieces(draft: _Draft) -> Iterator[tuple[int, int, bool]]:
    """Yield start, end and whether it is trained, of the text between and inside the spans."""
    position = 0
    for span in draft.spans:
        yield position, span.start, False
        yield span.start, span.end, True
        position = span.end
    yield position, len(draft.text), False


def _roles(
    draft: _Draft, pieces: Sequence[tuple[int, int, int, Any]], runs: Sequence[Run]
) -> tuple[tuple[str, int, int], ...]:
    """Return role, tokens and trained tokens of each message's words.

    A piece is what was tokenized at once: start and end in the text, first token, encoding.
    """
    assert isinstance(draft.row, Conversation)
    counted = []
    for index, start, end in draft.words:
        found = next((piece for piece in pieces if piece[0] <= start and end <= piece[1]), None)
        if found is None or end <= start:
            continue
        offset, encoding = found[0], found[3]
        first, last = encoding.char_to_token(start - offset), encoding.char_to_token(end - 1 - offset)
        if first is None or last is None:
            continue
        tokens, at = last + 1 - first, first + found[2]
        trained = tokens if any(a <= at and at + tokens <= b for a, b in runs) else 0
        counted.append((draft.row.messages[index].role, tokens, trained))
    return tuple(counted)


def _find_words(conversation: Conversation, text: str) -> list[tuple[int, int, int]]:
    """Return where each message's words stand, for the count by role; words that are not found are left out of it."""
    found, position = [], 0
    for index, message in enumerate(conversation.messages):
        words = message.content.strip()
        start = text.find(words, position) if words else -1
        if start >= 0:
            position = start + len(words)
            found.append((index, start, position))
    return found


def _misread(decoded: str, wanted: str) -> LossMaskError | None:
    # Tokenizers of SentencePiece kind do not give a first blank back; some write composed characters (NFC).
    if decoded == wanted or decoded in (wanted.removeprefix(" "), unicodedata.normalize("NFC", wanted)):
        return None
    return LossMaskError(
        f"the trained tokens read {decoded[:80]!r}, but the answer is {wanted[:80]!r}: the tokenizer changes its text"
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
