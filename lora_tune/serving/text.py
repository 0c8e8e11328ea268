"""Token ids → the text of an answer, piece by piece: whole characters only, and nothing of a stop string."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that is one byte, in tokenizers that fall back to bytes: a run of them is read as a whole, when it has ended."""

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class AnswerText:
    """The text of one answer while its tokens come in.

    What `feed` and `finish` give, joined, is `tokenizer.decode(ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)` up to the stop string that is complete first, however the tokens cut it.

    Args:
        tokenizer: a fast tokenizer; it is only read, so several answers may share it.
        stops: stop strings, none of them empty.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        assert all(stops), "an empty stop string stops everywhere"
        self._backend = tokenizer.backend_tokenizer
        self._silent = _special_ids(tokenizer)
        self._stops = tuple(stops)
        self._window: list[int] = []
        """The tokens since the last place where a character ended for certain, and those right before it."""
        self._seen = ""
        """What of the window's text was taken already."""
        self._held = ""
        """Text that may turn out to be the beginning of a stop string."""
        self.n_decoded = 0
        """Characters decoded so far, held back or not: where the next token's text begins."""
        self.n_given = 0
        """Characters given so far."""
        self.stopped = False
        """A stop string matched; nothing more will be given."""

    def feed(self, token_id: int) -> str:
        """Return the text that is certain now and was not given before."""
        piece = self._backend.id_to_token(token_id)
        if self.stopped or piece is None or token_id in self._silent:
            return ""
        self._window.append(token_id)
        return "" if _BYTE.fullmatch(piece) else self._give(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """Return the rest, when no more tokens come; a stop string may still be found in it."""
        return "" if self.stopped else self._give(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        """Return the text that the window has gained."""
        text: str = self._backend.decode(self._window, skip_special_tokens=True)
        unfinished = not last and text.endswith(_UNFINISHED)
        certain = text[:-1] if unfinished else text
        gained = certain[len(self._seen) :]
        self._seen = certain
        if gained and not unfinished:
            self._move_window()
        return gained

    def _move_window(self) -> None:
        """Begin the window with its last tokens, as few as write something on their own.

        Decoders look at what stands before a token (some drop a space at the very beginning), so one that wrote something
        stays in front.
        """
        for start in range(len(self._window) - 1, max(-1, len(self._window) - 9), -1):
            if _BYTE.fullmatch(self._backend.id_to_token(self._window[start]) or ""):
                return  # a run of bytes is never cut
            text = self._backend.decode(self._window[start:], skip_special_tokens=True)
            if text and _UNFINISHED not in text:
                self._window, self._seen = self._window[start:], text
                return

    def _give(self, gained: str, *, last: bool) -> str:
        self.n_decoded += len(gained)
        if not self._stops:
            self.n_given += len(gained)
            return gained
        text = self._held + gained
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.stopped, self._held, given = True, "", text[:cut]
        else:
            keep = 0 if last else _beginning_of_a_stop(text, self._stops)
            given, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.n_given += len(given)
        return given


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop string that is complete first begins, the longest of several that end there; None without any."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


def _beginning_of_a_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of the text could begin a stop string."""
    longest = max(map(len, stops)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(stop) > size and stop.startswith(tail) for stop in stops):
            return size
    return 0


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes that one token stands for; of a special token, those of its name."""
    piece = tokenizer.backend_tokenizer.id_to_token(token_id)
    if piece is None:
        return b""  # the model's vocabulary is longer than the tokenizer's
    match = _BYTE.fullmatch(piece)
    if match is not None:
        return bytes([int(match[1], 16)])
    if _is_byte_level(tokenizer):
        values = [_bytes_of_characters().get(character) for character in piece]
        if None not in values:
            return bytes(value for value in values if value is not None)
    return str(piece).replace("▁", " ").encode("utf-8", "replace")


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


@lru_cache(maxsize=8)
def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """Return what each character of a byte-level token stands for.

    Source: GPT-2's encoder (Radford et al. 2019): printable bytes are themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
