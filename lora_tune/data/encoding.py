"""Rendered rows → token ids and loss mask, proved or refused; tokens.py renders them and finds the answers."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_tune.data.messages import Conversation, PlainText
from lora_tune.data.rendering import LossMaskError, Place, Span, special_tokens
from lora_tune.data.roles import RoleCount, Run, SaidRow, role_counts


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
    """The trained tokens, one run an answer; never the first token, which nothing stands before to predict it from."""

    roles: tuple[RoleCount, ...]
    """Role, tokens and trained tokens of what each message says; what the template adds is in none of them."""

    def as_row(self, where: str) -> TokenizedRow:
        """The row with its loss mask token by token."""
        trained = [False] * len(self.ids)
        for start, end in self.runs:
            trained[start:end] = [True] * (end - start)
        return TokenizedRow(tuple(self.ids), tuple(trained), where)


@dataclass
class Draft:
    """A row on its way: text and spans are known, its tokens not yet."""

    row: Conversation | PlainText
    indices: Sequence[int]
    """The messages that are trained; where the whole row is, those that are not."""

    text: str = ""
    spans: Sequence[Span] = ()
    """Where in the text each of them stands."""

    leads: Sequence[tuple[int, ...] | None] = ()
    """Per span: the ids that must stand right before it, from a control token on; None where they are not known."""

    places: dict[int, Place] = field(default_factory=dict)
    """Where each message's words stand, as far as that is known."""

    found: EncodedRow | LossMaskError | None = None


class RowEncoder:
    """Tokenizes drafts in batches, and proves what is trained of them."""

    def __init__(self, tokenizer: Any, *, train_on: str) -> None:
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may bring its own limits; a call of the tokenizer switches them off, and so do we.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._control = frozenset(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
        self._whole = train_on == "all"

    def encode(self, drafts: Sequence[Draft]) -> list[EncodedRow | LossMaskError]:
        """Return the drafts' tokens, proved, or why they are refused."""
        ready = [draft for draft in drafts if draft.found is None]
        texts = [draft for draft in ready if isinstance(draft.row, PlainText)]
        # As in a call of the tokenizer, but thousands at a time and on every core.
        for draft, encoding in zip(texts, self._batch(texts, add_special_tokens=True), strict=True):
            draft.found = self._text(encoding.ids)
        turns = [draft for draft in ready if isinstance(draft.row, Conversation)]
        proofs: list[tuple[Draft, Any, list[Run]]] = []
        for draft, encoding in zip(turns, self._batch(turns, add_special_tokens=False), strict=True):
            if self._whole:
                draft.found = _all_but(draft, encoding)
                continue
            runs = self._runs(draft, encoding)
            if runs is None:
                draft.found = self._encode_alone(draft)
            else:
                proofs.append((draft, encoding, runs))
        self._prove(proofs)
        return [draft.found for draft in drafts if draft.found is not None]

    def _batch(self, drafts: Sequence[Draft], *, add_special_tokens: bool) -> Sequence[Any]:
        found: Sequence[Any] = self._backend.encode_batch(
            [draft.text for draft in drafts], add_special_tokens=add_special_tokens
        )
        return found

    def _encode(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _runs(self, draft: Draft, encoding: Any) -> list[Run] | None:
        """Return each span's tokens, or None where a token reaches across an edge, or the prompt's tokens would change."""
        ids: list[int] = encoding.ids  # a copy each time it is asked for
        runs: list[Run] = []
        for span, lead in zip(draft.spans, draft.leads, strict=True):
            first = encoding.char_to_token(span.start)
            if first is None or encoding.token_to_chars(first)[0] != span.start:
                return None
            last = self._run_end(encoding, ids, draft.text, span.end)
            if last is None or not self._follows_prompt(draft.text[: span.start], lead, encoding, ids[:first]):
                return None
            runs.append((first, last))
        return runs

    def _run_end(self, encoding: Any, ids: Sequence[int], text: str, end: int) -> int | None:
        """Return the token after the span; its end-of-turn may take blanks that follow it with it."""
        following = encoding.char_to_token(end) if end < len(text) else len(ids)
        if following is not None and (following == len(ids) or encoding.token_to_chars(following)[0] == end):
            return int(following)
        last = encoding.char_to_token(end - 1)
        if last is None or ids[last] not in self._control:
            return None
        return None if text[end : encoding.token_to_chars(last)[1]].strip() else last + 1

    def _follows_prompt(self, prompt: str, lead: tuple[int, ...] | None, encoding: Any, before: list[int]) -> bool:
        """Whether the tokens before a span are the prompt's; from the last control token on, because it parts the text."""
        if lead is not None:
            return tuple(before[len(before) - len(lead) :]) == lead
        token = next((n for n in range(len(before) - 1, -1, -1) if before[n] in self._control), 0)
        start = encoding.token_to_chars(token)[0] if token else 0
        found: list[int] = self._encode(prompt[start:]).ids
        return found == before[token:]

    def _prove(self, proofs: Sequence[tuple[Draft, Any, list[Run]]]) -> None:
        """Refuse the rows in which a span's tokens do not read exactly as that span of the text."""
        pieces = [encoding.ids[start:end] for _, encoding, runs in proofs for start, end in runs]
        decoded = iter(self._backend.decode_batch(pieces, skip_special_tokens=False))
        for draft, encoding, runs in proofs:
            wrong = [
                self._misread(next(decoded), draft.text, (span.start, span.end), (encoding, run))
                for span, run in zip(draft.spans, runs, strict=True)
            ]
            refused = next((err for err in wrong if err is not None), None)
            draft.found = refused or _row(draft, encoding.ids, runs, encoding.char_to_token)

    def _misread(self, decoded: str, text: str, place: Place, tokens: tuple[Any, Run]) -> LossMaskError | None:
        wanted = text[place[0] : place[1]]
        # Tokenizers of SentencePiece kind do not give a first blank back; some write composed characters (NFC).
        if decoded == wanted or decoded in (wanted.removeprefix(" "), unicodedata.normalize("NFC", wanted)):
            return None
        # A control token may take the blanks around it with it; in use they are gone too.
        if decoded == self._without_swallowed(text, place, *tokens):
            return None
        return LossMaskError(
            f"the trained tokens read {decoded[:80]!r}, but the answer is {wanted[:80]!r}: "
            "the tokenizer changes its text"
        )

    def _without_swallowed(self, text: str, place: Place, encoding: Any, run: Run) -> str:
        read, position, ids = "", place[0], encoding.ids
        for token in range(*run):
            if ids[token] in self._control:
                start, end = encoding.token_to_chars(token)
                read += text[position:start] + text[start:end].strip()
                position = end
        return read + text[position : place[1]]

    def _encode_alone(self, draft: Draft) -> EncodedRow | LossMaskError:
        """Tokenize prompts and answers apart, as in use: an answer may begin with a line break, say."""
        ids: list[int] = []
        runs: list[Run] = []
        pieces: list[_Piece] = []
        position = 0
        for index, span in zip(draft.indices, draft.spans, strict=True):
            before = self._encode(draft.text[: span.start])
            if before.ids[: len(ids)] != ids:
                return _other_prompt(index)
            words = draft.text[span.start : span.end]
            answer = self._encode(words)
            decoded = self._backend.decode(answer.ids, skip_special_tokens=False)
            wrong = self._misread(decoded, words, (0, len(words)), (answer, (0, len(answer.ids))))
            if wrong is not None:
                return wrong
            ids = before.ids + answer.ids
            runs.append((len(before.ids), len(ids)))
            pieces += [_Piece(position, 0, 0, before), _Piece(span.start, span.start, len(before.ids), answer)]
            position = span.end
        rest = self._encode(draft.text[position:])
        pieces.append(_Piece(position, position, len(ids), rest))
        return _row(draft, ids + rest.ids, runs, lambda char: _token_at(pieces, char))

    def _text(self, ids: list[int]) -> EncodedRow | LossMaskError:
        """A text as it stands: at most one beginning-of-text, then exactly one end-of-text, which is trained."""
        while len(ids) > 1 and self._bos is not None and ids[0] == ids[1] == self._bos:
            del ids[0]
        if self._eos is None:
            return LossMaskError("the tokenizer has no end-of-text token, so the model would never learn to stop")
        while ids and ids[-1] == self._eos:
            del ids[-1]
        if not ids:
            return LossMaskError("the text is empty")
        ids.append(self._eos)
        return EncodedRow(ids, ((1, len(ids)),), (("text", len(ids), len(ids) - 1),))


@dataclass(frozen=True)
class _Piece:
    """A part of a row's text that was tokenized in a text of its own."""

    start: int
    """Its first character in the row's text; it reaches up to the next piece."""

    base: int
    """The first character of the text that was tokenized."""

    first: int
    """The first token of that text in the row."""

    encoding: Any


def _token_at(pieces: Sequence[_Piece], char: int) -> int | None:
    piece = next(piece for piece in reversed(pieces) if piece.start <= char)
    token = piece.encoding.char_to_token(char - piece.base)
    return None if token is None else piece.first + int(token)


def _row(
    draft: Draft, ids: list[int], runs: Sequence[Run], token_at: Callable[[int], int | None]
) -> EncodedRow | LossMaskError:
    """Return the row in which the spans of the draft are these runs."""
    assert isinstance(draft.row, Conversation)
    kept = tuple((max(start, 1), end) for start, end in runs if end > max(start, 1))
    if not kept:
        return LossMaskError("no token is trained")
    spans = dict(zip(draft.indices, zip(draft.spans, runs, strict=True), strict=True))
    said = SaidRow(draft.row.messages, draft.text, draft.places, spans)
    return EncodedRow(ids, kept, role_counts(said, kept, token_at=token_at))


def _all_but(draft: Draft, encoding: Any) -> EncodedRow | LossMaskError:
    """Return the row trained whole, but for its first token and for the messages that say they are not trained."""
    assert isinstance(draft.row, Conversation)
    messages = draft.row.messages
    left_out = [(span.start, span.end) for span in draft.spans]
    for index, message in enumerate(messages):
        if message.train is False and message.role != "assistant" and message.content.strip():
            if index not in draft.places:
                return LossMaskError(
                    f"message {index + 1} says that it is not trained, but where it stands is not certain",
                    hint="set data.train_on to assistant",
                )
            left_out.append(draft.places[index])
    kept = tuple(_kept(encoding, left_out))
    if not kept:
        return LossMaskError("no token is trained")
    said = SaidRow(messages, draft.text, draft.places, {})
    return EncodedRow(encoding.ids, kept, role_counts(said, kept, token_at=encoding.char_to_token))


def _kept(encoding: Any, left_out: Sequence[Place]) -> Iterator[Run]:
    """Yield the tokens from the second one on, of which no character is left out."""
    start = 1
    if left_out:
        for token, (a, b) in enumerate(encoding.offsets):
            if any(a < end and first < b for first, end in left_out):
                if start < token:
                    yield start, token
                start = max(1, token + 1)
    if start < len(encoding.ids):
        yield start, len(encoding.ids)


def _other_prompt(index: int) -> LossMaskError:
    return LossMaskError(
        f"message {index + 1} would be trained after other tokens than its prompt has in use: "
        "an answer before it is tokenized otherwise once the conversation goes on",
        hint="take the blanks around the answers away, or set data.train_on to last_assistant",
    )
