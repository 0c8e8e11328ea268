"""Text of rows made safe to show: characters that would act instead of being seen stand as visible signs.

Rows are strangers' text: an escape sequence can move a terminal's cursor, a direction mark can turn a line around.
"""

import unicodedata
from collections.abc import Iterator
from itertools import groupby

_JOINERS = "\u200c\u200d"
"""Invisible, but part of how Persian, Hindi or a family emoji is written; they do nothing to what stands around them."""
_OWN_SIGNS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}
_ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of control, format, surrogate and separating characters."""


def visible(text: str) -> str:
    """Return the text in one line, every control, direction and other acting character as a visible sign."""
    return "".join(piece for _, piece in pieces(text))


def visible_lines(text: str) -> str:
    """Return the text with its line breaks shown and kept, its tabs kept, and every other acting character as a sign."""
    kept = {"⏎": "⏎\n", "⇥": "\t"}
    return "".join(kept.get(piece, piece) if is_sign else piece for is_sign, piece in pieces(text))


def pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the text in parts: a sign that stands for one character (True), or a run that is shown as it is (False)."""
    if text.isascii() and text.isprintable():
        if text:
            yield False, text
        return
    for acts, run in groupby(text, _acts):
        if acts:
            yield from ((True, _sign(character)) for character in run)
        else:
            yield False, "".join(run)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in _ACTING and character not in _JOINERS


def _sign(character: str) -> str:
    if character in _OWN_SIGNS:
        return _OWN_SIGNS[character]
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
